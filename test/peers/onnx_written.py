#!/usr/bin/env python3
"""Checks ONNX files that Lathe wrote: onnx.checker accepts each, and ONNX Runtime computes what Lathe computed.

    LATHE_PEERS=/tmp/peers go test ./nn/onnx -run TestWritten
    python3 test/peers/onnx_written.py /tmp/peers

For every NAME.onnx in the folder there are NAME.in.INPUT.npy and NAME.out.OUTPUT.npy. The greatest difference is
relative to max(1, |value|); exit status 1 when one is above the tolerance (2e-5, or the second argument).
"""
import glob
import os
import sys

import numpy as np
import onnx
import onnxruntime as ort


def main(folder, tol=2e-5):
    bad = 0
    files = sorted(glob.glob(os.path.join(folder, "*.onnx")))
    if not files:
        sys.exit(f"no .onnx files in {folder}")
    for path in files:
        base = path[: -len(".onnx")]
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        so = ort.SessionOptions()
        so.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        s = ort.InferenceSession(path, so, providers=["CPUExecutionProvider"])
        ins = {i.name: np.load(f"{base}.in.{i.name}.npy") for i in s.get_inputs()}
        worst = 0.0
        for o, y in zip(s.get_outputs(), s.run(None, ins)):
            want = np.load(f"{base}.out.{o.name}.npy")
            if y.shape != want.shape:
                worst = float("inf")
                break
            worst = max(worst, float(np.max(np.abs(y.astype(np.float64) - want) / np.maximum(1, np.abs(want)))))
        ops = sum(1 for n in model.graph.node if n.op_type == "Transpose")
        print(f"{os.path.basename(path):24} {len(model.graph.node):4} nodes, {ops:2} Transpose, greatest difference {worst:.2e}")
        bad += not worst <= tol
    if bad:
        sys.exit(f"{bad} of {len(files)} files differ by more than {tol}")


if __name__ == "__main__":
    main(sys.argv[1], *(float(a) for a in sys.argv[2:3]))
