"""ONNX Runtime lowerings from outside of moec: each mistake is one message with the lowering's file and line."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
import torch

import moec
from moec.backends.onnxruntime import backend as onnxruntime
from moec.ir import CompileError

from ..custom_ops import cap_onnx, declare_cap, graph_of, refused

HERE = r"test_custom_onnx_lowering\.py:\d+"


@pytest.fixture(autouse=True)
def cap():
    return declare_cap()


ONNX_MISTAKES = {
    "no return": (lambda e, n: None, "returned NoneType, expected one Value(?s:.*)is a return missing"),
    "two results": (lambda e, n: e.operands(n) * 2, "returned Value, Value, expected one Value"),
    "a tensor": (lambda e, n: torch.zeros(1), "returned Tensor, expected one Value"),
    "unknown operator": (lambda e, n: e.op("Tahn", *e.operands(n)), r"no operator 'Tahn' in opset 23(?s:.*)'Tan'"),
    "unknown attribute": (
        lambda e, n: e.op("Gelu", *e.operands(n), approximation="tanh"),
        "Gelu has no attribute 'approximation'(?s:.*)did you mean 'approximate'",
    ),
    "operand count": (lambda e, n: e.op("Add", *e.operands(n)), r"op_type:Add.*input size 1 not in range"),
    "operand types": (lambda e, n: e.op("Mul", *e.operands(n), np.int64(2)), "op_type:Mul.*inconsistent type"),
    "a number": (
        lambda e, n: e.op("Mul", *e.operands(n), 2.0),
        r"input of Mul must be an ONNX value .* got float 2\.0",
    ),
    "result dtype": (lambda e, n: e.op("Cast", *e.operands(n), to=11), r"result 0 is DOUBLE in ONNX, expected FLOAT"),
    "result rank": (
        lambda e, n: e.op("ReduceSum", *e.operands(n), np.array([-1]), keepdims=0),
        r"result 0 has shape \[T\], expected f32\[T, 6\]",
    ),
    "result size": (
        lambda e, n: e.op("Concat", *e.operands(n), *e.operands(n), axis=-1),
        r"result 0 has shape \[T, 12\], expected f32\[T, 6\]",
    ),
    "a size for a symbol": (
        lambda e, n: e.op("Expand", np.float32([[1.0]]), np.array([4, 6])),
        r"result 0 has shape \[4, 6\], expected f32\[T, 6\]",
    ),
    "its own bug": (lambda e, n: e.operand(n), "failed: AttributeError: 'Emitter' object has no attribute 'operand'"),
}


@pytest.mark.parametrize("mistake", ONNX_MISTAKES)
def test_mistakes_of_an_onnx_lowering(mistake):
    fn, message = ONNX_MISTAKES[mistake]
    onnxruntime.lowers("test.cap")(fn)
    text = refused("onnxruntime", "lowering")
    assert re.search(rf"the lowering of test\.cap \(.*{HERE}\) (?s:.*){message}", text), text


def test_onnx_runtime_itself_refuses_by_op():
    onnxruntime.lowers("test.cap")(lambda e, n: e.op("QuickGelu", *e.operands(n), domain="com.microsoft", alfa=1.0))
    with pytest.raises(CompileError, match=r"test\.cap failed while loading in ONNX Runtime.*alfa"):
        moec.compile(graph_of("test.cap", cap=1.0), backend="onnxruntime")


def test_operators_without_inference_are_taken_as_they_are():
    onnxruntime.lowers("test.cap")(lambda e, n: e.op("QuickGelu", *e.operands(n), domain="com.microsoft", alpha=1.0))
    x = torch.randn(2, 6)
    got = moec.compile(graph_of("test.cap", cap=1.0), backend="onnxruntime")(x)[0]
    torch.testing.assert_close(got, -torch.nn.functional.silu(x.exp()))


def test_symbolic_sizes_pass_the_check():
    """Shapes that ONNX infers under names of its own, or not at all, are no mistakes."""

    def there_and_back(e, node):
        flat = e.op("Reshape", cap_onnx(e, node), np.array([-1]))
        return e.reshape(flat, [node.result.type.numel], node.result.shape)

    onnxruntime.lowers("test.cap")(there_and_back)
    x = torch.randn(3, 6)
    got = moec.compile(graph_of("test.cap", cap=1.0), backend="onnxruntime")(x)[0]
    torch.testing.assert_close(got, -torch.tanh(x.exp()))


def test_any_callable_may_be_a_lowering():
    class Lowering:
        def __call__(self, e, node, kind="Tanh"):
            return e.op(kind, *e.operands(node))

    space: dict = {}
    exec("def nameless(e, node): return e.op('Tanh', *e.operands(node))", space)
    x = torch.randn(2, 6)
    for fn in (Lowering(), functools.partial(Lowering(), kind="Tanh"), space["nameless"]):
        onnxruntime.lowers("test.cap")(fn)
        got = moec.compile(graph_of("test.cap", cap=1.0), backend="onnxruntime")(x)[0]
        torch.testing.assert_close(got, -torch.tanh(x.exp()))


def test_a_copy_of_the_backend_has_lowerings_of_its_own():
    graph = moec.parse("graph(%x: f32[T]) -> (%y: f32[T]) {\n  %0: f32[T] = math.neg(%x)\n  return %0\n}")

    def twice(e, node):
        return e.op("Add", *e.operands(node) * 2)

    copy = dataclasses.replace(onnxruntime, lowerings={**onnxruntime.lowerings, "math.neg": twice})
    x = torch.tensor([1.0, -3.0])
    assert torch.equal(copy.compile(graph).run([x])[0], 2 * x)
    executable = copy.compile(graph)
    assert torch.equal(executable.tap([x], graph.outputs)[graph.outputs[0]], 2 * x)
    assert torch.equal(onnxruntime.compile(graph).run([x])[0], -x)
