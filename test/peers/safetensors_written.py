#!/usr/bin/env python3
"""Checks that the safetensors package reads files that Lathe wrote.

    LATHE_PEERS=/tmp/peers go test ./nn/safetensors -run TestNetworks
    python3 test/peers/safetensors_written.py /tmp/peers

Prints every file's tensors and bytes; exit status 1 when one is not read, holds NaN, or its graph names a parameter that
the file does not have.
"""
import glob
import json
import os
import sys

import numpy as np
from safetensors import safe_open


def main(folder):
    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    if not files:
        sys.exit(f"no .safetensors files in {folder}")
    for path in files:
        with safe_open(path, "np") as f:
            keys = list(f.keys())
            arrays = {k: f.get_tensor(k) for k in keys}
            graph = json.loads(f.metadata()["lathe.network"])
        for k, a in arrays.items():
            if a.dtype.kind == "f" and np.isnan(a).any():
                sys.exit(f"{path}: {k} holds NaN")
        missing = {p for n in graph["nodes"] for p in n.get("params", {}).values()} - set(keys)
        if missing:
            sys.exit(f"{path}: no tensors for {sorted(missing)}")
        print(f"{os.path.basename(path):24} {len(keys):4} tensors, {sum(a.nbytes for a in arrays.values())} bytes, {len(graph['nodes'])} nodes")


if __name__ == "__main__":
    main(sys.argv[1])
