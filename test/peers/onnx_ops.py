#!/usr/bin/env python3
"""Writes nn/onnx/testdata/ops.json: small ONNX models of one operator or one exporter's pattern each, with inputs and what
ONNX Runtime computes for them. nn/onnx reads each and must agree.

Needs numpy, onnx and onnxruntime:

    python3 test/peers/onnx_ops.py
"""
import base64
import json
import os

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper as H
from onnx import numpy_helper as NH

HERE = os.path.dirname(os.path.abspath(__file__))
rng = np.random.default_rng(7)
cases = []


def f32(*shape, lo=-2.0, hi=2.0):
    return rng.uniform(lo, hi, shape).astype(np.float32)


def case(name, nodes, x, inits=None, opset=17, dims=None, extra=None, outputs=1, kind="", batches=True):
    """nodes read "x" (and the keys of extra) and write "y" (y0, y1, ... for several outputs)."""
    inputs = {"x": x, **(extra or {})}
    vi = []
    for k, v in inputs.items():
        shape = list(v.shape)
        if batches and shape:
            shape[0] = "N"
        vi.append(H.make_tensor_value_info(k, NH.from_array(v).data_type, shape))
    names = ["y"] if outputs == 1 else [f"y{i}" for i in range(outputs)]
    g = H.make_graph(
        nodes, name, vi, [H.make_empty_tensor_value_info(n) for n in names],
        [v if isinstance(v, onnx.TensorProto) else NH.from_array(np.asarray(v), k) for k, v in (inits or {}).items()],
    )
    m = H.make_model(g, opset_imports=[H.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10)
    so = ort.SessionOptions()
    so.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    s = ort.InferenceSession(m.SerializeToString(), so, providers=["CPUExecutionProvider"])
    ys = s.run(None, inputs)
    pack = lambda a: {"shape": list(a.shape), "dtype": str(a.dtype), "data": [float(f"{v:.9g}") for v in a.astype(np.float64).reshape(-1)]}
    cases.append({
        "name": f"{name}@{opset}", "model": base64.b64encode(m.SerializeToString()).decode(), "kind": kind,
        "inputs": {k: pack(v) for k, v in inputs.items()}, "outputs": [pack(np.asarray(y)) for y in ys],
    })


def n(op, ins, outs="y", **attrs):
    return H.make_node(op, ins.split() if isinstance(ins, str) else ins, outs.split(), **attrs)


i64 = lambda *v: np.array(v, dtype=np.int64)

# elementwise
for op in ("Relu Sigmoid Tanh Exp Sqrt Reciprocal Erf Abs Neg Sin Cos Floor Ceil Round Sign Softplus HardSwish Identity Elu Selu Softsign LeakyRelu HardSigmoid").split():
    case(op, [n(op, "x")], f32(2, 3, 4, lo=0.1) if op in ("Sqrt", "Reciprocal") else f32(2, 3, 4))
case("Log", [n("Log", "x")], f32(2, 5, lo=0.2))
case("Mish", [n("Mish", "x")], f32(2, 5), opset=18)
case("Elu.alpha", [n("Elu", "x", alpha=0.3)], f32(2, 5))
case("Gelu", [n("Gelu", "x")], f32(2, 5), opset=20)
case("Gelu.tanh", [n("Gelu", "x", approximate="tanh")], f32(2, 5), opset=20)
for op in "Add Sub Mul Div Pow Max Min".split():
    a = f32(2, 3, 4, lo=0.3)
    case(op + ".values", [n(op, "x b")], a, extra={"b": f32(2, 1, 4, lo=0.3)})
    case(op + ".row", [n(op, "x c")], a, {"c": f32(4, lo=0.3)})
    case(op + ".left", [n(op, "c x")], a, {"c": f32(3, 1, lo=0.3)})
    case(op + ".scalar", [n(op, "x c")], a, {"c": np.float32(1.7)})
    case(op + ".scalar.left", [n(op, "c x")], a, {"c": np.array([1.7], np.float32)})
case("Mean", [n("Mean", "x b c")], f32(2, 3), {"c": f32(3)}, extra={"b": f32(2, 3)})
case("Sum", [n("Sum", "x b c")], f32(2, 3), {"c": f32(3)}, extra={"b": f32(2, 3)})
case("Clip", [n("Clip", "x lo hi")], f32(2, 3), {"lo": np.float32(-0.5), "hi": np.float32(1)})
case("Clip.lo", [n("Clip", "x lo")], f32(2, 3), {"lo": np.float32(-0.5)})
case("Clip.hi", [n("Clip", ["x", "", "hi"])], f32(2, 3), {"hi": np.float32(0.5)})
case("PRelu.channel", [n("PRelu", "x s")], f32(2, 3, 4, 4), {"s": f32(3, 1, 1)})
case("PRelu.last", [n("PRelu", "x s")], f32(2, 5), {"s": f32(5)})
case("PRelu.one", [n("PRelu", "x s")], f32(2, 3, 4), {"s": f32(1)})
case("Where", [n("Greater", "x z", "c"), n("Where", "c x b")], f32(2, 4), {"z": np.float32(0)}, extra={"b": f32(2, 4)})
for op in "Equal Less Greater LessOrEqual GreaterOrEqual".split():
    case(op, [n(op, "x b", "c"), n("Cast", "c", to=T.FLOAT)], np.round(f32(2, 6)), extra={"b": np.round(f32(2, 6))})
case("Logic", [n("Less", "x a", "p"), n("Greater", "x b", "q"), n("And", "p q", "r"), n("Not", "r", "s"), n("Or", "s p", "t"), n("Cast", "t", to=T.FLOAT)],
     f32(2, 6), {"a": np.float32(1), "b": np.float32(-1)})
case("Cast.int", [n("Cast", "x", "i", to=T.INT32), n("Cast", "i", to=T.FLOAT)], f32(2, 6))
case("Cast.bool", [n("Cast", "x", "i", to=T.BOOL), n("Cast", "i", to=T.FLOAT)], np.round(f32(2, 6)))
case("Cast.half", [n("Cast", "x", "i", to=T.FLOAT16), n("Cast", "i", to=T.FLOAT)], np.round(f32(2, 6)))

# convolution and pooling
for opset in (11, 17):
    case("Conv", [n("Conv", "x w b", pads=[1, 1, 1, 1])], f32(2, 3, 5, 6), {"w": f32(4, 3, 3, 3), "b": f32(4)}, opset)
case("Conv.stride", [n("Conv", "x w", pads=[0, 1, 2, 1], strides=[2, 1])], f32(2, 3, 6, 5), {"w": f32(4, 3, 3, 2)})
case("Conv.dilation", [n("Conv", "x w", dilations=[2, 1])], f32(2, 3, 6, 5), {"w": f32(4, 3, 2, 2)})
case("Conv.groups", [n("Conv", "x w b", group=2)], f32(2, 4, 5, 5), {"w": f32(6, 2, 3, 3), "b": f32(6)})
case("Conv.depthwise", [n("Conv", "x w", group=4, pads=[1, 1, 1, 1])], f32(2, 4, 5, 5), {"w": f32(4, 1, 3, 3)})
case("Conv.multiplier", [n("Conv", "x w", group=2)], f32(2, 2, 5, 5), {"w": f32(4, 1, 3, 3)})
case("Conv.1d", [n("Conv", "x w b", pads=[1, 1])], f32(2, 3, 7), {"w": f32(4, 3, 3), "b": f32(4)})
case("Conv.3d", [n("Conv", "x w")], f32(1, 2, 4, 4, 4), {"w": f32(3, 2, 2, 2, 2)})
case("Conv.same.upper", [n("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], f32(2, 2, 5, 6), {"w": f32(3, 2, 3, 2)})
case("Conv.same.lower", [n("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])], f32(2, 2, 5, 6), {"w": f32(3, 2, 3, 2)})
case("Conv.pointwise", [n("Conv", "x w")], f32(2, 3, 4, 4), {"w": f32(5, 3, 1, 1)})
case("Conv.add", [n("Conv", "x w", "c"), n("Add", "c b")], f32(2, 3, 4, 4), {"w": f32(5, 3, 3, 3), "b": f32(5, 1, 1)}, kind="conv")
case("Conv.flatten", [n("Conv", "x w", "c"), n("Flatten", "c", "f"), n("Gemm", "f m", transB=1)], f32(2, 3, 4, 4), {"w": f32(5, 3, 3, 3), "m": f32(3, 20)})
for k, a in {"": {}, ".stride": dict(strides=[2, 2]), ".pads": dict(strides=[2, 2], pads=[1, 0, 1, 1]), ".outpad": dict(strides=[3, 2], output_padding=[1, 1]),
             ".dilation": dict(dilations=[2, 2]), ".tiles": dict(strides=[3, 2]), ".same": dict(strides=[2, 2], auto_pad="SAME_UPPER"),
             ".shape": dict(strides=[2, 2], output_shape=[8, 9])}.items():
    case("ConvTranspose" + k, [n("ConvTranspose", "x w b", **a)], f32(2, 3, 4, 4), {"w": f32(3, 5, 3, 2), "b": f32(5)})
case("ConvTranspose.groups", [n("ConvTranspose", "x w", group=2, strides=[2, 2])], f32(2, 4, 3, 3), {"w": f32(4, 3, 3, 3)})
case("ConvTranspose.1d", [n("ConvTranspose", "x w", strides=[2])], f32(2, 3, 5), {"w": f32(3, 2, 4)})
for op in ("MaxPool", "AveragePool"):
    case(op, [n(op, "x", kernel_shape=[2, 2], strides=[2, 2])], f32(2, 3, 6, 4))
    case(op + ".overlap", [n(op, "x", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])], f32(2, 3, 6, 5))
    case(op + ".ceil", [n(op, "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], f32(2, 3, 6, 8))
    case(op + ".ceil.pad", [n(op, "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)], f32(2, 3, 6, 7))
    case(op + ".same", [n(op, "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")], f32(2, 3, 6, 7))
    case(op + ".1d", [n(op, "x", kernel_shape=[3])], f32(2, 3, 7))
case("AveragePool.include", [n("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], f32(2, 3, 5, 5))
case("GlobalAveragePool", [n("GlobalAveragePool", "x")], f32(2, 3, 4, 5))
case("GlobalMaxPool", [n("GlobalMaxPool", "x")], f32(2, 3, 4, 5))

# matrices
case("MatMul", [n("MatMul", "x w")], f32(2, 3, 4), {"w": f32(4, 5)})
case("MatMul.values", [n("MatMul", "x b")], f32(2, 3, 4), extra={"b": f32(2, 4, 5)})
case("MatMul.broadcast", [n("MatMul", "x b")], f32(2, 2, 3, 4), extra={"b": f32(2, 1, 4, 5)})
case("MatMul.left", [n("MatMul", "w x")], f32(2, 3, 4), {"w": f32(5, 3)})
case("MatMul.bias", [n("MatMul", "x w", "m"), n("Add", "b m")], f32(2, 3, 4), {"w": f32(4, 5), "b": f32(5)}, kind="dense")
case("Gemm", [n("Gemm", "x w b", transB=1)], f32(2, 4), {"w": f32(5, 4), "b": f32(5)}, kind="dense")
case("Gemm.plain", [n("Gemm", "x w b", beta=0.5)], f32(2, 4), {"w": f32(4, 5), "b": f32(1, 5)}, kind="dense")
case("Gemm.scalar", [n("Gemm", "x w b")], f32(2, 4), {"w": f32(4, 5), "b": f32(1)}, kind="dense")
case("Gemm.alpha", [n("Gemm", "x w", alpha=0.5)], f32(2, 4), {"w": f32(4, 5)})

# shapes
case("Reshape", [n("Reshape", "x s")], f32(2, 3, 4), {"s": i64(0, 4, 3)})
case("Reshape.infer", [n("Reshape", "x s")], f32(2, 3, 4), {"s": i64(-1, 12)})
case("Reshape.merge", [n("Reshape", "x s")], f32(2, 3, 4), {"s": i64(-1, 4)})
case("Flatten", [n("Flatten", "x", axis=2)], f32(2, 3, 4))
case("Transpose", [n("Transpose", "x", perm=[0, 2, 1])], f32(2, 3, 4))
case("Transpose.batch", [n("Transpose", "x", perm=[1, 0, 2])], f32(2, 3, 4))
case("Squeeze", [n("Squeeze", "x a")], f32(2, 1, 4, 1), {"a": i64(1, -1)})
case("Squeeze", [n("Squeeze", "x", axes=[1])], f32(2, 1, 4), opset=11)
case("Unsqueeze", [n("Unsqueeze", "x a")], f32(2, 4), {"a": i64(1, 3)})
case("Concat", [n("Concat", "x b c", axis=1)], f32(2, 3), {"c": f32(1, 2)[[0, 0]]}, extra={"b": f32(2, 2)}, batches=False)
case("Concat.images", [n("Conv", "x w", "c"), n("Concat", "c x", axis=1)], f32(2, 3, 4, 4), {"w": f32(2, 3, 1, 1)})
case("Slice", [n("Slice", "x s e a t")], f32(2, 6, 5), {"s": i64(1, -3), "e": i64(100, -1), "a": i64(1, 2), "t": i64(2, 1)})
case("Slice.reverse", [n("Slice", "x s e a t")], f32(2, 6), {"s": i64(-1), "e": i64(-100), "a": i64(1), "t": i64(-2)})
case("Slice.image", [n("Conv", "x w", "c"), n("Slice", "c s e a")], f32(2, 3, 4, 4), {"w": f32(4, 3, 1, 1), "s": i64(1, 1), "e": i64(3, 4), "a": i64(1, 3)})
case("Split", [n("Split", "x p", "y0 y1", axis=1)], f32(2, 5), {"p": i64(2, 3)}, outputs=2)
case("Split.equal", [n("Split", "x", "y0 y1", axis=-1)], f32(2, 3, 4), outputs=2)
case("Split", [n("Split", "x", "y0 y1", axis=1, split=[1, 4])], f32(2, 5), outputs=2, opset=11)
case("Gather.rows", [n("Gather", "x i", axis=1)], f32(2, 4, 3), {"i": i64(2, 0, -1)})
case("Gather.one", [n("Gather", "x i", axis=1)], f32(2, 4, 3), {"i": np.int64(-2)})
case("Gather.table", [n("Gather", "w x")], np.array([[1, 0, 2], [4, 3, 3]], np.int64), {"w": f32(5, 4)}, kind="embedding")
case("Expand", [n("Expand", "x s")], f32(2, 1, 4), {"s": i64(1, 3, 1)})
case("Tile", [n("Tile", "x r")], f32(2, 1, 4), {"r": i64(1, 3, 1)})
for mode in ("constant", "edge", "reflect"):
    case("Pad." + mode, [n("Pad", "x p", mode=mode)], f32(2, 4, 5), {"p": i64(0, 1, 2, 0, 2, 1)})
case("Pad.value", [n("Pad", "x p v")], f32(2, 4), {"p": i64(0, 1, 0, 2), "v": np.float32(3)})
case("Pad.image", [n("Conv", "x w", "c"), n("Pad", "c p", mode="reflect")], f32(2, 3, 4, 4), {"w": f32(4, 3, 1, 1), "p": i64(0, 0, 1, 2, 0, 0, 0, 1)})
case("DepthToSpace.DCR", [n("DepthToSpace", "x", blocksize=2)], f32(2, 8, 3, 2))
case("DepthToSpace.CRD", [n("DepthToSpace", "x", blocksize=2, mode="CRD")], f32(2, 8, 3, 2))
case("SpaceToDepth", [n("SpaceToDepth", "x", blocksize=2)], f32(2, 3, 4, 6))
case("OneHot", [n("OneHot", "x d v")], np.array([[0, 2], [1, 3]], np.int64), {"d": i64(4), "v": np.array([-1, 2], np.float32)})
case("ArgMax", [n("ArgMax", "x", axis=1, keepdims=0)], f32(2, 5, 3))
for coord in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
    case("Resize.linear." + coord, [n("Resize", ["x", "", "s"], mode="linear", coordinate_transformation_mode=coord)], f32(2, 2, 3, 4), {"s": np.array([1, 1, 2, 1.5], np.float32)})
    for r in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        case(f"Resize.{coord}.{r}", [n("Resize", ["x", "", "s"], mode="nearest", coordinate_transformation_mode=coord, nearest_mode=r)], f32(1, 2, 3, 4), {"s": np.array([1, 1, 2, 1.5], np.float32)})
case("Resize.sizes", [n("Resize", ["x", "", "", "s"], mode="linear")], f32(2, 2, 3, 4), {"s": i64(2, 2, 5, 3)}, batches=False)
case("Resize.sizes.nearest", [n("Resize", ["x", "", "", "s"], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")], f32(2, 2, 3, 4), {"s": i64(2, 2, 6, 8)}, batches=False)
case("Resize.down", [n("Resize", ["x", "", "s"], mode="linear")], f32(2, 2, 6, 8), {"s": np.array([1, 1, 0.5, 0.25], np.float32)})

# reductions and norms
for op in "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceSumSquare".split():
    case(op, [n(op, "x", axes=[1], keepdims=0)] if op != "ReduceSum" else [n(op, "x a", keepdims=0)], f32(2, 3, 4), {"a": i64(1)} if op == "ReduceSum" else None)
    case(op, [n(op, "x a")], f32(2, 3, 4), {"a": i64(-1)}, opset=18)
case("ReduceMean.image", [n("Conv", "x w", "c"), n("ReduceMean", "c", axes=[2, 3], keepdims=0)], f32(2, 3, 4, 4), {"w": f32(4, 3, 1, 1)})
case("ReduceMean.channels", [n("Conv", "x w", "c"), n("ReduceMean", "c", axes=[1], keepdims=0)], f32(2, 3, 4, 5), {"w": f32(4, 3, 1, 1)})
for op in ("Softmax", "LogSoftmax"):
    case(op, [n(op, "x")], f32(2, 3, 4))
    case(op + ".axis", [n(op, "x", axis=1)], f32(2, 3, 4))
    case(op + ".flat", [n(op, "x", axis=1)], f32(2, 3, 4), opset=11)
case("Softmax.image", [n("Conv", "x w", "c"), n("Softmax", "c", axis=1)], f32(2, 3, 4, 4), {"w": f32(4, 3, 1, 1)})
case("BatchNormalization", [n("BatchNormalization", "x s b m v", epsilon=1e-3)], f32(2, 3, 4, 4), {"s": f32(3), "b": f32(3), "m": f32(3), "v": f32(3, lo=0.5)})
case("BatchNormalization.flat", [n("BatchNormalization", "x s b m v")], f32(4, 3), {"s": f32(3), "b": f32(3), "m": f32(3), "v": f32(3, lo=0.5)})
case("LayerNormalization", [n("LayerNormalization", "x s b")], f32(2, 3, 8), {"s": f32(8), "b": f32(8)}, kind="layernorm")
case("LayerNormalization.two", [n("LayerNormalization", "x s", axis=1)], f32(2, 3, 8), {"s": f32(3, 8)}, kind="layernorm")
case("InstanceNormalization", [n("InstanceNormalization", "x s b")], f32(2, 3, 4, 4), {"s": f32(3), "b": f32(3)})
case("GroupNormalization", [n("GroupNormalization", "x s b", num_groups=2)], f32(2, 4, 3, 3), {"s": f32(4), "b": f32(4)}, opset=21)

# shape arithmetic that keeps the batch open
case("shape.heads", [
    n("Shape", "x", "s"), n("Gather", "s zero", "b"), n("Gather", "s one", "t"), n("Unsqueeze", "b ax", "bu"), n("Unsqueeze", "t ax", "tu"),
    n("Concat", "bu tu two three", "sh", axis=0), n("Reshape", "x sh", "r"), n("Transpose", "r", "p", perm=[0, 2, 1, 3]),
    n("Mul", "b two0", "b2"), n("Unsqueeze", "b2 ax", "b2u"), n("Concat", "b2u tu three", "sh2", axis=0), n("Reshape", "p sh2"),
], f32(2, 5, 6), {"zero": np.int64(0), "one": np.int64(1), "ax": i64(0), "two": i64(2), "three": i64(3), "two0": np.int64(2)})
case("shape.expand", [
    n("Shape", "x", "s"), n("Slice", "s z one0", "b"), n("Concat", "b four", "sh", axis=0), n("ConstantOfShape", "sh", "m"), n("Concat", "m x", axis=1),
], f32(2, 3), {"z": i64(0), "one0": i64(1), "four": i64(4)})
case("shape.token", [
    n("Shape", "x", "s"), n("Gather", "s zero", "b"), n("Unsqueeze", "b ax", "bu"), n("Concat", "bu m1 m1", "sh", axis=0),
    n("Shape", "sh", "len"), n("ConstantOfShape", "len", "ones", value=NH.from_array(i64(1))), n("Mul", "ones m1", "neg"), n("Equal", "sh neg", "eq"),
    n("Where", "eq ones sh", "shape"), n("Expand", "cls shape", "tok"), n("Concat", "tok x", axis=1),
], f32(2, 3, 4), {"zero": np.int64(0), "ax": i64(0), "m1": i64(-1), "cls": f32(1, 1, 4)})
case("shape.range", [
    n("Shape", "x", "s"), n("Gather", "s one", "t"), n("Range", "zero t one", "r"), n("Cast", "r", "f", to=T.FLOAT), n("Add", "x f"),
], f32(2, 5), {"zero": np.int64(0), "one": np.int64(1)})
case("constant.nodes", [
    H.make_node("Constant", [], ["w"], value=NH.from_array(f32(4, 3))), H.make_node("Constant", [], ["k"], value_float=0.5), n("MatMul", "x w", "m"), n("Mul", "m k"),
], f32(2, 4))

# patterns
case("pattern.layernorm", [
    n("ReduceMean", "x", "m", axes=[-1]), n("Sub", "x m", "d"), n("Pow", "d two", "p"), n("ReduceMean", "p", "v", axes=[-1]), n("Add", "v eps", "ve"),
    n("Sqrt", "ve", "sd"), n("Div", "d sd", "q"), n("Mul", "q g", "h"), n("Add", "h b"),
], f32(2, 3, 8), {"two": np.float32(2), "eps": np.float32(1e-5), "g": f32(8), "b": f32(8)}, kind="layernorm")
case("pattern.layernorm.channels", [
    n("ReduceMean", "x", "m", axes=[1]), n("Sub", "x m", "d"), n("Mul", "d d", "p"), n("ReduceMean", "p", "v", axes=[1]), n("Add", "eps v", "ve"),
    n("Sqrt", "ve", "sd"), n("Div", "d sd", "q"), n("Mul", "g q", "h"), n("Add", "b h"),
], f32(2, 6, 3, 3), {"eps": np.float32(1e-5), "g": f32(6, 1, 1), "b": f32(6, 1, 1)}, kind="layernorm")
case("pattern.rmsnorm", [
    n("Pow", "x two", "p"), n("ReduceMean", "p", "v", axes=[-1]), n("Add", "v eps", "ve"), n("Sqrt", "ve", "sd"), n("Reciprocal", "sd", "r"),
    n("Mul", "x r", "q"), n("Mul", "q g"),
], f32(2, 3, 8), {"two": np.float32(2), "eps": np.float32(1e-5), "g": f32(8)}, kind="rmsnorm")
case("pattern.gelu.erf", [n("Div", "x r2", "d"), n("Erf", "d", "e"), n("Add", "e one", "a"), n("Mul", "x a", "m"), n("Mul", "m half")],
     f32(2, 6), {"r2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}, kind="gelu")
case("pattern.gelu.half.first", [n("Mul", "x half", "h"), n("Mul", "x i2", "d"), n("Erf", "d", "e"), n("Add", "one e", "a"), n("Mul", "h a")],
     f32(2, 6), {"i2": np.float32(0.5**0.5), "one": np.float32(1), "half": np.float32(0.5)}, kind="gelu")
case("pattern.gelu.tanh", [
    n("Pow", "x three", "c"), n("Mul", "c k", "kc"), n("Add", "x kc", "s"), n("Mul", "s q", "i"), n("Tanh", "i", "t"), n("Add", "t one", "a"), n("Mul", "x half", "h"), n("Mul", "h a"),
], f32(2, 6), {"three": np.float32(3), "k": np.float32(0.044715), "q": np.float32((2 / np.pi) ** 0.5), "one": np.float32(1), "half": np.float32(0.5)}, kind="gelu")
case("pattern.hardswish", [n("Add", "x three", "a"), n("Clip", "a zero six", "c"), n("Mul", "x c", "m"), n("Div", "m six")],
     f32(2, 6, lo=-5, hi=5), {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)}, kind="HardSwish")
case("pattern.hardswish.sigmoid", [n("HardSigmoid", "x", "h", alpha=1 / 6, beta=0.5), n("Mul", "x h")], f32(2, 6, lo=-5, hi=5), kind="HardSwish")
case("pattern.silu", [n("Sigmoid", "x", "s"), n("Mul", "x s")], f32(2, 6), kind="Silu")
case("pattern.softmax", [n("ReduceMax", "x", "m", axes=[-1]), n("Sub", "x m", "d"), n("Exp", "d", "e"), n("ReduceSum", "e a", "s"), n("Div", "e s")],
     f32(2, 6), {"a": i64(-1)}, kind="softmax")
case("pattern.attention", [
    n("MatMul", "x wq", "q"), n("MatMul", "x wk", "k"), n("MatMul", "x wv", "v"), n("Transpose", "k", "kt", perm=[0, 2, 1]), n("MatMul", "q kt", "l"),
    n("Div", "l s", "ls"), n("Softmax", "ls", "p", axis=-1), n("MatMul", "p v"),
], f32(2, 3, 4), {"wq": f32(4, 4), "wk": f32(4, 4), "wv": f32(4, 4), "s": np.float32(2)}, kind="attention")
case("not.gelu", [n("Div", "x r2", "d"), n("Erf", "d", "e"), n("Add", "e one", "a"), n("Mul", "x a", "m"), n("Mul", "m half")],
     f32(2, 6), {"r2": np.float32(2), "one": np.float32(1), "half": np.float32(0.5)}, kind="no gelu")

# quantised
u8 = lambda *s: rng.integers(0, 256, s).astype(np.uint8)
case("qdq.activation", [n("QuantizeLinear", "x s z", "q"), n("DequantizeLinear", "q s z")], f32(2, 6), {"s": np.float32(0.02), "z": np.uint8(100)}, kind="qdq")
case("qdq.signed", [n("QuantizeLinear", "x s z", "q"), n("DequantizeLinear", "q s z")], f32(2, 6), {"s": np.float32(0.02), "z": np.int8(3)}, kind="qdq")
case("qdq.channel", [n("QuantizeLinear", "x s z", "q", axis=1), n("DequantizeLinear", "q s z", axis=1)], f32(2, 3, 4),
     {"s": np.array([0.01, 0.02, 0.03], np.float32), "z": np.array([10, 128, 200], np.uint8)}, kind="qdq")
case("qdq.apart", [n("QuantizeLinear", "x s z", "q"), n("DequantizeLinear", "q t z")], f32(2, 6), {"s": np.float32(0.02), "t": np.float32(0.04), "z": np.uint8(100)})
case("dq.weight", [n("DequantizeLinear", "w s z", "wf", axis=1), n("MatMul", "x wf")], f32(2, 4),
     {"w": u8(4, 3), "s": np.array([0.01, 0.02, 0.03], np.float32), "z": np.array([128, 120, 130], np.uint8)}, kind="dense")
case("dq.conv", [n("DequantizeLinear", "w s", "wf", axis=0), n("Conv", "x wf")], f32(2, 3, 4, 4),
     {"w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), "s": f32(4, lo=0.01, hi=0.02)}, kind="conv")
w4 = rng.integers(-8, 8, (8, 3))
case("dq.blocks", [n("DequantizeLinear", "w s", "wf", axis=0, block_size=4), n("MatMul", "x wf")], f32(2, 8),
     {"w": H.make_tensor("w", T.INT4, (8, 3), w4), "s": f32(2, 3, lo=0.01, hi=0.2)}, opset=21, kind="dense")

with open(os.path.join(HERE, "../../nn/onnx/testdata/ops.json"), "w") as f:
    json.dump({"onnxruntime": ort.__version__, "cases": cases}, f, separators=(",", ":"))
    f.write("\n")
print(len(cases), "cases")
