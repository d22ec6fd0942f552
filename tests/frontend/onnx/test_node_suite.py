"""A slice of the ONNX backend test suite; bench/judge_onnx.py runs all of it."""

from __future__ import annotations

import warnings

import onnx
import pytest
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner, _normalize_tensor

from moec.ir import CompileError
from moec.onnx_backend import OnnxRuntimeBackend, ReferenceBackend

EVERY = 45


def cases() -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero and overflows on purpose
        everything = load_model_tests(kind="node")
    return everything[7::EVERY]


@pytest.fixture(scope="module")
def suite() -> list:
    return cases()


@pytest.mark.parametrize("backend", [ReferenceBackend, OnnxRuntimeBackend], ids=lambda b: b.backend)
def test_slice(suite, backend):
    passed, failed = 0, {}
    for case in suite:
        try:
            prepared = backend.prepare(case.model, "CPU", threads=1)
            for inputs, expected in case.data_sets:
                got = prepared.run([_normalize_tensor(x) for x in inputs])
                want = [_normalize_tensor(x) for x in expected]
                Runner.assert_similar_outputs(want, got, rtol=case.rtol, atol=case.atol)
            passed += 1
        except Exception as e:
            failed[case.name] = f"{type(e).__name__}: {e}"
    wrong = {n: why for n, why in failed.items() if why.startswith("AssertionError")}
    assert not wrong
    assert passed >= 0.9 * len(suite), failed


def with_symbols(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a symbol for every size of its inputs, and no claims of its results."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for i, v in enumerate(copy.graph.input):
        for j, d in enumerate(v.type.tensor_type.shape.dim):
            d.Clear()
            d.dim_param = f"d{i}_{j}"
    for v in copy.graph.output:
        for d in v.type.tensor_type.shape.dim:
            d.Clear()
    return copy


def test_slice_with_symbolic_sizes(suite):
    """A case that comes in with unknown sizes gives what it gives with known ones."""
    passed, wrong, refused = 0, {}, {}
    for case in suite:
        tensors = [
            v.type.WhichOneof("value") == "tensor_type" for v in (*case.model.graph.input, *case.model.graph.output)
        ]
        if not all(tensors):
            continue
        for backend in (ReferenceBackend, OnnxRuntimeBackend):
            try:
                prepared = backend.prepare(with_symbols(case.model), "CPU", threads=1)
                for inputs, expected in case.data_sets:
                    got = prepared.run([_normalize_tensor(x) for x in inputs])
                    want = [_normalize_tensor(x) for x in expected]
                    Runner.assert_similar_outputs(want, got, rtol=case.rtol, atol=case.atol)
                passed += 1
            except AssertionError as e:
                wrong[case.name] = f"{backend.backend}: {e}"
            except CompileError as e:
                refused[case.name] = e.message
    assert not wrong
    assert passed >= 0.85 * 2 * len(suite), refused


def test_run_node_and_devices():
    import numpy as np
    from onnx import helper

    x = np.array([1.0, -2.0], np.float32)
    for backend in (ReferenceBackend, OnnxRuntimeBackend):
        (y,) = backend.run_node(helper.make_node("Abs", ["x"], ["y"]), [x])
        assert y.tolist() == [1.0, 2.0]
        assert backend.supports_device("CPU")
        assert not backend.supports_device("CUDA:0")
        with pytest.raises(TypeError, match="CPU only"):
            backend.prepare(None, "CUDA")
