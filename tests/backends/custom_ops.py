"""Ops of tests, declared as a user would, and what is asked of their lowerings."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.ir import Attr, Builder, CompileError, Dim, DType, Graph, Operand, TensorType, op
from moec.testing import assert_backends_agree


def declare_cap(name: str = "test.cap", elementwise: bool = True):
    """tanh(x / cap) · cap"""

    @op(name, elementwise=elementwise)
    class Cap:
        """tanh(x / cap) · cap"""

        x: Operand
        cap: Attr[float]

        def infer(self):
            return self.x

        def reference(self):
            return torch.tanh(self.x / self.cap) * self.cap

    return Cap


def cap_onnx(e, node):
    (x,), limit = e.operands(node), e.scalar(node.attrs["cap"], node.result.dtype)
    return e.op("Mul", e.op("Tanh", e.op("Div", x, limit)), limit)


def cap_triton(op):
    return f"tanh({op.x} / {op.cap}) * {op.cap}"


def graph_of(name, dtype="f32", **attrs):
    """neg(name(exp(x))) over [T, 6]."""
    g = Graph("g")
    b = Builder(g)
    x = g.add_input("x", TensorType(dtype, (Dim("T"), 6)))
    g.add_output(b.neg(b.op(name, [b.exp(x)], attrs)))
    return g


def agree(name, dtype="f32", **attrs):
    """`name` is the same on every backend, within tolerance."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(DType.of(dtype).torch)
    g = graph_of(name, dtype, **attrs)
    return assert_backends_agree(g, (x,), backends=("reference", "onnxruntime", "triton"))


def refused(backend, code, name="test.cap"):
    """The message of the error that compiling or running `name` on a backend ends with."""
    with pytest.raises(CompileError) as caught:
        moec.compile(graph_of(name, cap=3.0), backend=backend)(torch.zeros(2, 6))
    assert caught.value.code == code, caught.value
    return str(caught.value)
