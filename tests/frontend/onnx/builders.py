"""Small ONNX models, and what they give in ONNX's own evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import moec
from moec.frontend.onnx import Imported, import_onnx
from moec.ir import run
from moec.ir.arrays import from_numpy, to_numpy

Shape = Sequence[int | str | None] | None


def value(name: str, shape: Shape, dtype: Any = np.float32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 22,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def one_op(op: str, arrays: Sequence[np.ndarray], outputs: int = 1, *, opset: int = 22, dynamic: bool = False,
           constant: Sequence[int] = (), **attrs: Any) -> onnx.ModelProto:  # fmt: skip
    """A model of one operator; operands numbered in `constant` are initialisers, sizes are symbols if `dynamic`."""
    names = [f"x{i}" for i in range(len(arrays))]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attrs)
    given = [i for i in range(len(arrays)) if i not in constant]
    ins = [
        value(names[i], [f"d{i}_{k}" for k in range(arrays[i].ndim)] if dynamic else arrays[i].shape, arrays[i].dtype)
        for i in given
    ]
    outs = [helper.make_value_info(f"y{i}", onnx.TypeProto()) for i in range(outputs)]
    return model([node], ins, outs, {names[i]: arrays[i] for i in constant}, opset=opset)


def expected(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(x) for x in ReferenceEvaluator(proto).run(None, feeds)]


def assert_same(got: Sequence[torch.Tensor], want: Sequence[np.ndarray], what: str = "", rtol: float = 1e-5) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        g = to_numpy(g)
        assert (g.shape, g.dtype) == (w.shape, w.dtype), what
        np.testing.assert_allclose(g.astype(np.float64), w.astype(np.float64), rtol=rtol, atol=rtol, err_msg=what)


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], *, native: bool | None = None,
          rtol: float = 1e-5) -> Imported:  # fmt: skip
    """Import, and compare reference and ONNX Runtime, with the default passes and without, to ONNX's evaluator."""
    imported = import_onnx(proto)
    if native is not None:
        assert (not imported.extern) == native, imported.extern
    want = expected(proto, feeds)
    inputs = [from_numpy(feeds[str(v.name)]) for v in imported.graph.inputs]
    assert_same(run(imported.graph, inputs), want, "interpreter", rtol)
    assert moec.parse(str(imported.graph)) == imported.graph
    for backend in ("reference", "onnxruntime"):
        for passes in (None, moec.passes.Pipeline(())):
            compiled = moec.compile(imported.graph, backend=backend, passes=passes)
            assert_same(compiled(*inputs), want, f"{backend} {passes}", rtol)
    return imported


def session(proto: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime gives for the model, or the file, itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    source = proto if isinstance(proto, Path) else proto.SerializeToString()
    run = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [np.asarray(x) for x in run.run(None, feeds)]


def agrees(compiled: Any, proto: onnx.ModelProto, feeds: dict[str, np.ndarray], rtol: float = 1e-5) -> None:
    """A compiled model against ONNX Runtime on the model itself."""
    got = compiled(**{n: from_numpy(a) for n, a in feeds.items()})
    assert_same(got, session(proto, feeds), str({n: a.shape for n, a in feeds.items()}), rtol)


__all__ = ["TensorProto", "agrees", "assert_same", "check", "expected", "helper", "model", "numpy_helper", "one_op",
           "session", "value"]  # fmt: skip
