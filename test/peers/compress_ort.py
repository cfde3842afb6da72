"""Hold quantised ONNX files against Lathe's own evaluation of the same network.

    compress_ort.py MODEL.onnx INPUTS.npy OUTPUTS.npy [--labels LABELS.npy] [--points 0.2] [--cosine 0.999]

OUTPUTS.npy is what `lathe compress --save-outputs` wrote: the outputs of the quantised network on INPUTS.npy
(`--save-inputs`). ONNX Runtime runs the model at ORT_ENABLE_BASIC, which keeps QuantizeLinear and DequantizeLinear as
they are, and again at its default level, which fuses them into integer kernels of its own. The first must agree with
Lathe: top-1 classes on all but --points percent of the cases (with labels: accuracies within --points), and a mean
cosine of the outputs of at least --cosine. What the default level does is printed, and not judged. Exit code 1: it does not agree.
"""

import argparse
import sys

import numpy as np
import onnxruntime as ort


def run(model, x, level, batch=50):
    o = ort.SessionOptions()
    o.graph_optimization_level = level
    o.log_severity_level = 3
    s = ort.InferenceSession(model, o, providers=["CPUExecutionProvider"])
    name = s.get_inputs()[0].name
    y = [s.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)]
    return np.concatenate(y).reshape(len(x), -1)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("inputs")
    p.add_argument("outputs")
    p.add_argument("--labels")
    p.add_argument("--points", type=float, default=0.2)
    p.add_argument("--cosine", type=float, default=0.999)
    a = p.parse_args()
    x, want = np.load(a.inputs), np.load(a.outputs)
    want = want.reshape(len(want), -1)
    if len(x) != len(want):
        sys.exit(f"{a.inputs} has {len(x)} cases, {a.outputs} {len(want)}")
    labels = np.load(a.labels) if a.labels else None
    ok = True
    for level, judged in ((ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, True), (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, False)):
        got = run(a.model, x, level)
        same = 100 * np.mean(got.argmax(1) == want.argmax(1))
        norm = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
        cosine = np.mean((got * want).sum(1) / np.maximum(norm, 1e-30))
        line = f"{a.model}: {level.name}: {len(x)} cases, top-1 agreement {same:.2f} %, cosine {cosine:.7f}, greatest difference {np.abs(got - want).max():.4g}"
        good = cosine >= a.cosine
        if labels is not None:
            theirs, ours = 100 * np.mean(got.argmax(1) == labels), 100 * np.mean(want.argmax(1) == labels)
            line += f", accuracy {theirs:.2f} % (Lathe {ours:.2f} %)"
            good = good and abs(theirs - ours) <= a.points
        else:
            good = good and 100 - same <= a.points
        if judged:
            ok = ok and good
            line += ": agrees" if good else ": DISAGREES"
        print(line)
    sys.exit(0 if ok else 1)


main()
