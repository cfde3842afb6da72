"""ONNX Runtime's quantisers as contestants of `lathe bench compress --peer "python3 test/peers/quantize_ort.py"`.

    quantize_ort.py variants
    quantize_ort.py quantize --model M.onnx --calib A.npy[,B.npy] --eval A.npy[,B.npy] --variant V --bits N --out O.onnx --save-outputs Y.npy
    quantize_ort.py run      --model M.onnx --eval A.npy[,B.npy] --save-outputs Y.npy

Each prints one JSON object. `quantize` runs the float model's own preparation (shape inference, folding of batch norm),
then quantize_static with 8-bit activations, or MatMulNBits for weights alone; the calibration cases are those that
Lathe gets. `run` computes the outputs of a model, Lathe's own among them, at ORT_ENABLE_BASIC, which keeps
QuantizeLinear and DequantizeLinear as they are. Needs numpy, onnx and onnxruntime, and onnx_ir for MatMulNBits.
"""

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}
VARIANTS = [
    ("static tensor minmax", 8, 8),
    ("static channel minmax", 8, 8),
    ("static channel entropy", 8, 8),
    ("static channel percentile", 8, 8),
    ("static channel minmax", 4, 8),
    ("static channel percentile", 4, 8),
    ("static channel minmax products", 8, 8),
    ("static channel percentile products", 8, 8),
    ("static channel minmax products", 4, 8),
    ("MatMulNBits", 4, 32),
]
# What a variant of "products" quantises: by default sums and others are, too, and the sum with an attention mask of -1e9
# or so takes the whole range of its eight bits.
PRODUCTS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


def feeds(model, paths):
    s = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [i.name for i in s.get_inputs()]
    arrays = [np.load(p) for p in paths.split(",")]
    if len(names) != len(arrays):
        sys.exit(f"{model} has {len(names)} inputs, {len(arrays)} files were given")
    return dict(zip(names, arrays))


class Reader(CalibrationDataReader):
    def __init__(self, feed, batch):
        n = len(next(iter(feed.values())))
        self.parts = iter([{k: v[i : i + batch] for k, v in feed.items()} for i in range(0, n, batch)])

    def get_next(self):
        return next(self.parts, None)


def outputs(model, feed, batch=16):
    o = ort.SessionOptions()
    o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    o.log_severity_level = 3
    s = ort.InferenceSession(model, o, providers=["CPUExecutionProvider"])
    n = len(next(iter(feed.values())))
    return np.concatenate([s.run(None, {k: v[i : i + batch] for k, v in feed.items()})[0] for i in range(0, n, batch)])


def quantize(a):
    feed = feeds(a.model, a.calib)
    work = tempfile.mkdtemp(prefix="ort-quantize-")
    prepared = os.path.join(work, "prepared.onnx")
    begin = time.time()
    quant_pre_process(a.model, prepared, skip_symbolic_shape=True)
    if a.variant == "MatMulNBits":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        q = MatMulNBitsQuantizer(onnx.load(prepared), block_size=32, is_symmetric=False, bits=a.bits)
        q.process()
        if not any(n.op_type == "MatMulNBits" for n in q.model.model.graph.node):
            sys.exit("the model has no MatMul with a constant weight, which is all that MatMulNBits serves")
        q.model.save_model_to_file(a.out, False)
    else:
        _, granularity, method, *products = a.variant.split()
        quantize_static(
            prepared, a.out, Reader(feed, 16), quant_format=QuantFormat.QDQ, per_channel=granularity == "channel",
            weight_type=QuantType.QInt8 if a.bits == 8 else QuantType.QInt4, activation_type=QuantType.QUInt8,
            calibrate_method=METHODS[method], op_types_to_quantize=PRODUCTS if products else None,
        )
    seconds = time.time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.save(a.save_outputs, outputs(a.out, feeds(a.out, a.eval)))
    return {"seconds": seconds, "peak_mb": peak, "size": {"parameters": 0}}


def main():
    logging.disable(logging.WARNING)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("verb", choices=["variants", "quantize", "run"])
    for name in ("model", "calib", "eval", "variant", "out", "save-outputs"):
        p.add_argument("--" + name)
    p.add_argument("--bits", type=int, default=8)
    a = p.parse_args()
    printed, sys.stdout = sys.stdout, sys.stderr  # the calibrators print, too
    if a.verb == "variants":
        said = {"tool": "onnxruntime", "version": "ONNX Runtime " + ort.__version__,
                "variants": [{"name": n, "bits": b, "activation_bits": act} for n, b, act in VARIANTS]}
    elif a.verb == "quantize":
        said = quantize(a)
    else:
        np.save(a.save_outputs, outputs(a.model, feeds(a.model, a.eval)))
        said = {}
    print(json.dumps(said), file=printed)


if __name__ == "__main__":
    main()
