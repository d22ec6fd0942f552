"""Triton lowerings from outside of moec: expressions, kernels wherever they are written, and every mistake."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton as triton_package
import triton.language as tl
from triton.language import arange

import moec
from moec.backends.onnxruntime import backend as onnxruntime
from moec.backends.triton import backend as triton
from moec.ir import Builder, CompileError, Graph, Operand, TensorType, Weight, op
from moec.passes import Pipeline

from ..custom_ops import agree, cap_onnx, declare_cap, graph_of, refused

HERE = r"test_custom_kernels\.py:\d+"


@pytest.fixture(autouse=True)
def ops():
    declare_cap()
    declare_cap("test.rowcap", elementwise=False)


# -- Triton: expressions ------------------------------------------------------------------------------

EXPRESSION_MISTAKES = {
    "no return": (lambda op: None, "lowering", "returned NoneType, expected one str"),
    "a tensor": (lambda op: torch.tanh(op.x), "lowering", "failed: TypeError(?s:.*)returns an expression"),
    "unknown field": (lambda op: f"{op.y}", "lowering", "AttributeError: 'Cap' object has no attribute 'y'"),
    "unknown function": (lambda op: f"tahn({op.x})", "lowering", r"names 'tahn' in 'tahn\(x0\)'(?s:.*)mean 'tanh'"),
    "no expression": (lambda op: f"y = {op.x}", "lowering", "is no expression"),
    "no operand": (lambda op: "1.0", "lowering", "uses no operand"),
    "another type": (lambda op: f"{op.x} > 0", "execution", r"the expression is not f32"),
    "another shape": (lambda op: f"tl.sum({op.x})", "execution", r"the expression is not one value each"),
}


@pytest.mark.parametrize("mistake", EXPRESSION_MISTAKES)
def test_mistakes_of_an_expression(mistake):
    fn, code, message = EXPRESSION_MISTAKES[mistake]
    triton.lowers("test.cap")(fn)
    text = refused("triton", code)
    assert re.search(rf"test\.cap \(.*{HERE}(?s:.*){message}", text), text


def test_what_is_not_elementwise_is_no_expression():
    @op("test.total", elementwise=True)
    class Total:
        x: Operand

        def infer(self):
            return self.x.with_shape(self.x.shape[:1])

        def reference(self):
            return self.x.sum(-1)

    triton.lowers("test.total")(lambda op: f"{op.x}")
    with pytest.raises(CompileError, match=r"declared elementwise, but makes \(f32\[T\]\) of \(f32\[T, 6\]\)"):
        moec.compile(graph_of("test.total"), backend="triton")


# -- Triton: kernels ----------------------------------------------------------------------------------

HALF = tl.constexpr(0.5)
TWICE = 2.0
NOT_SENT = object()


@triton_package.jit
def tanh_of(x):
    return 1.0 - TWICE / (tl.exp(TWICE * x) + 1.0)


@triton_package.jit
def cap_kernel(x_ptr, y_ptr, cap, stride_row, stride_col, width, BLOCK: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride_row + col * stride_col, mask=col < width, other=0.0).to(DTYPE)
    y = tanh_of(x / cap) * (cap * HALF) * tl.cdiv(2 * BLOCK, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * width + col, y, mask=col < width)


def run_cap(op, x, kernel=cap_kernel, **constants):
    y = torch.empty(x.shape, dtype=x.dtype)
    triton.launch(kernel, x.shape[0], x, y, op.cap, *x.stride(), x.shape[1], **{"BLOCK": 8, **constants})
    return y


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_kernel_runs_with_what_it_names(dtype):
    onnxruntime.lowers("test.rowcap")(cap_onnx)
    triton.lowers("test.rowcap")(lambda op: run_cap(op, op.x))
    agree("test.rowcap", dtype, cap=2.5)


def test_strides_views_and_empty_grids():
    def lowered(op):
        wide = torch.zeros(6, 2 * op.x.shape[0])
        wide[:, ::2] = op.x.T
        x = wide.T[::2]  # strides (2, 2 T)
        assert torch.equal(x, op.x)
        assert x.stride() == (2, max(1, 2 * len(x)))
        whole = torch.full((2, *x.shape), 9.0)
        y = whole[1]  # a view with an offset: the rest stays
        triton.launch(cap_kernel, (x.shape[0],), x, y, op.cap, *x.stride(), 6, BLOCK=8)
        assert whole[0].eq(9.0).all()
        return y.clone()

    triton.lowers("test.rowcap")(lowered)
    compiled = moec.compile(graph_of("test.rowcap", cap=2.0), backend="triton")
    for rows in (3, 1, 0):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(compiled(x)[0], -torch.tanh(x.exp() / 2) * 2)


def test_a_weight_is_a_tensor_for_a_lowering_from_outside():
    seen = []
    triton.lowers("test.rowcap")(lambda op: (seen.append(type(op.x)), run_cap(op, op.x))[1])
    g = Graph("g")
    b = Builder(g)
    x = g.add_input("x", TensorType("f32", (2, 6)))
    w = g.add_weight(Weight.of("w", torch.randn(2, 6)))
    g.add_output(b.add(x, b.op("test.rowcap", [w], {"cap": 2.0})))
    moec.compile(g, backend="triton", passes=Pipeline(()))(torch.zeros(2, 6))
    assert seen == [torch.Tensor]


@triton_package.jit
def misspelt_kernel(x_ptr, y_ptr, cap, stride_row, stride_col, width, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.lod(x_ptr))


@triton_package.jit
def unsendable_kernel(x_ptr, y_ptr, cap, stride_row, stride_col, width, BLOCK: tl.constexpr):
    NOT_SENT  # noqa: B018  (the kernel names it, that is the point)


@triton_package.jit
def undefined_kernel(x_ptr, y_ptr, cap, stride_row, stride_col, width, BLOCK: tl.constexpr):
    tl.store(y_ptr, nothing_of_that_name)  # noqa: F821  (the point)


@triton_package.jit
def by_name_kernel(x_ptr, y_ptr, cap, stride_row, stride_col, width, BLOCK: tl.constexpr):
    tl.store(y_ptr + arange(0, 2), 1.0)


def plain_kernel(x_ptr, y_ptr):
    pass


tuned_kernel = triton_package.autotune([triton_package.Config({"BLOCK": 8})], ["cap"])(cap_kernel)

KERNEL_MISTAKES = {

    "forgotten return": (lambda op: None, "lowering", "returned NoneType, expected one Tensor"),
    "another type": (lambda op: op.x.double(), "execution", r"gave f64\[2, 6\], its type says f32\[2, 6\]"),
    "another shape": (lambda op: op.x[:1], "execution", r"test\.rowcap gave f32\[1, 6\], its type says f32\[2, 6\]"),
    "its own bug": (lambda op: op.y, "lowering", "AttributeError: 'Cap' object has no attribute 'y'"),
    "a missing argument": (
        lambda op: triton.launch(cap_kernel, 1, op.x, op.x, BLOCK=8), "lowering", "missing 4 required positional"),
    "an unknown constant": (
        lambda op: run_cap(op, op.x, BLOK=8), "kernel", "has no parameter 'BLOK'(?s:.*)did you mean 'BLOCK'"),
    "an argument that is none": (
        lambda op: triton.launch(cap_kernel, 1, op.x, {1}, BLOCK=8), "lowering", "cannot send a set"),
    "no tensor": (lambda op: triton.launch(cap_kernel, 1, 3, BLOCK=8), "lowering", "needs a tensor"),
    "a grid of four": (lambda op: triton.launch(cap_kernel, (1,) * 4, op.x), "lowering", "grid must be 1 to 3 sizes"),
    "a grid that is no number": (lambda op: triton.launch(cap_kernel, 1.5, op.x), "lowering", "grid must be|iterable"),
    "no decorator": (
        lambda op: run_cap(op, op.x, plain_kernel), "kernel", r"@triton\.jit, got function plain_kernel"),
    "autotune": (lambda op: run_cap(op, op.x, tuned_kernel), "kernel", r"@triton\.jit, got Autotuner"),
    "an error in the kernel": (
        lambda op: run_cap(op, op.x, misspelt_kernel), "lowering",
        r"no attribute 'lod'(?s:.*)test_custom_kernels\.py, sent to the interpreter>\", line \d+, in misspelt_kernel"),
    "what cannot be sent": (
        lambda op: run_cap(op, op.x, unsendable_kernel), "kernel",
        rf"kernel unsendable_kernel \(.*{HERE}\) names 'NOT_SENT', which is of type object(?s:.*)TRITON_INTERPRET=1"),
    "a function of triton by name": (
        lambda op: run_cap(op, op.x, by_name_kernel), "kernel",
        r"names 'arange', a function of triton\.language(?s:.*)write tl\.arange"),
    "what is not defined": (
        lambda op: run_cap(op, op.x, undefined_kernel), "kernel", "names 'nothing_of_that_name', which is not defined"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", KERNEL_MISTAKES)
def test_mistakes_of_a_kernel_lowering(mistake):
    fn, code, message = KERNEL_MISTAKES[mistake]
    triton.lowers("test.rowcap")(fn)
    text = refused("triton", code, "test.rowcap")
    assert re.search(message, text), text
    if code != "execution":
        assert re.search(rf"the lowering of test\.rowcap \(.*{HERE}\)", text), text
    assert "test.rowcap(" in text  # the IR around it


def test_kernels_of_a_module_that_cannot_be_imported(tmp_path):
    """As in a notebook: the text is known, the module is not, and closures count as names."""
    path = tmp_path / "cell.py"
    path.write_text(
        textwrap.dedent("""
        import triton
        import triton.language as tl
        from triton.language import cdiv, constexpr
        def make(factor):
            @triton.jit
            def kernel(x, y, cap, sr, sc, width, BLOCK: constexpr):
                col = tl.arange(0, cdiv(BLOCK, 1))
                at = tl.program_id(0) * width + col
                e = tl.exp(2.0 * tl.load(x + at, mask=col < width) / cap)
                tl.store(y + at, (1.0 - 2.0 / (e + 1.0)) * cap * factor, mask=col < width)
            return kernel
        """)
    )
    space = {"__name__": "no_such_module"}
    exec(compile(path.read_text(), str(path), "exec"), space)
    triton.lowers("test.rowcap")(lambda op: run_cap(op, op.x, space["make"](3.0)))
    x = torch.randn(2, 6)
    got = moec.compile(graph_of("test.rowcap", cap=2.0), backend="triton")(x)[0]
    torch.testing.assert_close(got, -torch.tanh(x.exp() / 2) * 6)


def test_a_process_that_interprets_runs_kernels_in_place(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "custom-kernel.md").read_text("utf-8")
    (source,) = re.findall(r'^```python title="capped_softmax.py"\n(.*?)^```', page, re.S | re.M)
    code = source + textwrap.dedent("""
        import moec
        from moec.backends.triton import mode
        g = moec.parse('graph(%x: f32[T, 5]) -> (%y: f32[T, 5]) { %0: f32[T, 5] = my.capped_softmax(%x) return %0 }')
        x = torch.randn(3, 5) * 20
        want = torch.softmax(torch.tanh(x / 30) * 30, -1)
        torch.testing.assert_close(moec.compile(g, backend="triton")(x)[0], want)
        print(mode())
        """)
    path = tmp_path / "script.py"
    path.write_text(code)
    for value, expected in (("1", "interpreter"), ("0", "worker")):
        env = os.environ | {"TRITON_INTERPRET": value}
        done = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True)
        assert done.stdout == f"{expected}\n", done.stderr


def test_a_copy_of_the_backend_has_lowerings_of_its_own():
    """Of ops that generated kernels compute, and of others."""
    graph = moec.parse(
        "graph(%x: f32[T, 4]) -> (%y: f32[T, 4]) {\n"
        "  %0: f32[T, 4] = math.neg(%x)\n  %1: f32[T, 4] = norm.rms(%0, _)\n  return %1\n}"
    )
    other = {"math.neg": lambda op: f"{op.x} * 2.0", "norm.rms": lambda op: op.x + 1}
    copy = dataclasses.replace(triton, lowerings={**triton.lowerings, **other})
    x = torch.tensor([[1.0, -3.0, 0.0, 2.0]])
    assert torch.equal(copy.compile(graph).run([x])[0], 2 * x + 1)
    assert torch.allclose(triton.compile(graph).run([x])[0], moec.ir.run(graph, [x])[0])
