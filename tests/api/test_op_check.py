"""`check_op` holds the parts of an op against each other: each kind of disagreement is found, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton as triton_package
import triton.language as tl

from moec.backends.onnxruntime import backend as onnxruntime
from moec.backends.triton import backend as triton
from moec.ir import Attr, CompileError, Operand, OptionalOperand, TensorType, op, require
from moec.testing import check_op

BOTH = ("onnxruntime", "triton")


def cap_onnx(e, node):
    (x,), cap = e.operands(node), e.scalar(node.attrs["cap"], node.result.dtype)
    return e.op("Mul", e.op("Tanh", e.op("Div", x, cap)), cap)


def cap_triton(op):
    return f"tanh({op.x} / {op.cap}) * {op.cap}"


def declare(*, elementwise=True, commutative=False, onnx=cap_onnx, expression=cap_triton, **methods):
    """`test.cap` with parts of it replaced."""

    class Cap:
        """tanh(x / cap) · cap"""

        x: Operand
        cap: Attr[float]

        def infer(self):
            return self.x

        def reference(self):
            return torch.tanh(self.x / self.cap) * self.cap

    for name, fn in methods.items():
        setattr(Cap, name, fn)
    # annotations of a class in a function are text, whose names are this module's
    op("test.cap", elementwise=elementwise, commutative=commutative)(Cap)
    if onnx is not None:
        onnxruntime.lowers("test.cap")(onnx)
    if expression is not None:
        triton.lowers("test.cap")(expression)
    return Cap


def test_a_right_op_passes():
    cap = declare(decompose=lambda self, b: b.mul(b.tanh(b.div(self.x, self.cap)), self.cap))
    check = check_op(cap)
    assert check.cases == 7  # three sizes in two dtypes, and special values
    assert list(check.backends) == ["onnxruntime", "triton", "decomposition"]
    assert all(text.startswith("11 cases") for text in check.backends.values())  # and four with symbolic sizes
    assert str(check_op("cap", backends=("onnxruntime",))).startswith("test.cap: 7 cases\n  onnxruntime: 11")


def test_shipped_ops_pass():
    for name in ("norm.rms", "linear.linear", "math.max", "math.softmax"):
        check_op(name)


def wrong_shape(self):
    require(self.x.rank, "rank")
    return self.x.with_shape(self.x.shape[:-1])


MISTAKES = {
    "infer's dtype": ({"infer": lambda s: s.x.with_dtype("f64")}, r"gave f32\[0, 1\], its type says f64\[0, 1\]"),
    "infer's shape": ({"infer": wrong_shape}, r"gave f32\[0, 1\], its type says f32\[0\]"),
    "infer raises": ({"infer": lambda s: s.y}, r"infer\(\) of test.cap .*raised AttributeError"),
    "infer with numbers only": (
        {"infer": lambda s: TensorType(s.x.dtype, tuple(13 if not isinstance(d, int) else d for d in s.x.shape))},
        r"compiled for f32\[N, M\]: .* gave f32\[11, 13\], its type says f32\[13, 13\]",
    ),
    "reference returns nothing": ({"reference": lambda s: None}, r"reference\(\) returned NoneType, expected 1"),
    "reference in place": ({"reference": lambda s: s.x.mul_(2)}, r"reference\(\) changes an operand in place"),
    "one percent in the reference": (
        {"reference": lambda s: torch.tanh(s.x / s.cap) * s.cap * 1.01}, r"on onnxruntime: error 0\.01\d*, tolerance"),
    "one percent on ONNX Runtime": (
        {"onnx": lambda e, n: e.op("Mul", cap_onnx(e, n), e.scalar(1.01, n.result.dtype))}, r"on onnxruntime: error"),
    "one percent on Triton": ({"expression": lambda op: f"({cap_triton(op)}) * 1.01"}, r"on triton: error"),
    "overflow": (
        {"expression": lambda op: f"(tl.exp({op.x}) - tl.exp(-{op.x})) / (tl.exp({op.x}) + tl.exp(-{op.x}))",
             "reference": lambda s: torch.tanh(s.x), "onnx": lambda e, n: e.op("Tanh", *e.operands(n))},
        r"case 6: \(f32\[5\]\).* on triton: error inf"),
    "NaN lost": (
        {"expression": lambda op: f"tl.where({op.x} > 0, {op.x}, 0.0)", "reference": lambda s: torch.relu(s.x),
             "onnx": lambda e, n: e.op("Relu", *e.operands(n))}, r"case 6: .* on triton: error inf"),
    "a wrong decomposition": ({"decompose": lambda s, b: b.tanh(s.x)}, r"on decomposition: error"),
    "a decomposition that fails": ({"decompose": lambda s, b: b.tahn(s.x)}, r"never runs on decomposition.*'tahn'"),
    "a decomposition into itself": ({"decompose": lambda s, b: b.cap(s.x, cap=s.cap)}, r"holds the op itself"),
    "a decomposition of another type": (
        {"decompose": lambda s, b: b.cast(s.x, dtype="f64")}, r"decomposition of test.cap \(.*\) gives f64"),
    "a decomposition without return": ({"decompose": lambda s, b: None}, r"decomposition of .* returned NoneType"),
    "not elementwise": ({"reference": lambda s: s.x.cumsum(0)}, r"declared elementwise, with the last element"),
    "not elementwise in shape": (
        {"infer": wrong_shape, "reference": lambda s: s.x.sum(-1)}, r"elementwise, but its result is f32\[0\]"),
    "no lowering": ({"onnx": None}, r"never runs on onnxruntime: onnxruntime has no lowering of test.cap"),
    "sizes of the example": (
        {"onnx": lambda e, n: e.op("Reshape", cap_onnx(e, n), np.array(
            [d if isinstance(d, int) else 11 + 2 * i for i, d in enumerate(n.result.shape)], np.int64))},
        r"compiled for f32\[N, M\].* has shape \[11, 13\], expected f32\[N, M\]"),
    "no samples": ({"samples": staticmethod(lambda r: iter(()))}, r"samples\(\) yields nothing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_disagreement_is_found(mistake):
    parts, message = MISTAKES[mistake]
    with pytest.raises(AssertionError, match=f"(?s)test.cap.*{message}") as caught:
        check_op(declare(**parts))
    assert "test_op_check.py:" in str(caught.value)


def test_operands_that_do_not_commute():
    @op("test.minus", commutative=True)
    class Minus:
        a: Operand
        b: Operand

        def infer(self):
            return self.a

        def reference(self):
            return self.a - self.b

    with pytest.raises(AssertionError, match="is declared commutative, with operands exchanged: error"):
        check_op(Minus, backends=())


def test_samples_are_asked_for_where_guessing_fails():
    @op("test.rows")
    class Rows:
        x: Operand
        bias: OptionalOperand

        def infer(self):
            require(self.bias is None or self.bias.rank == 1, "bias must be a row")
            return self.x

        def reference(self):
            return self.x if self.bias is None else self.x + self.bias

    with pytest.raises(AssertionError, match=r"no guessing operands that it takes .*bias must be a row.*give"):
        check_op(Rows, backends=())
    Rows.samples = staticmethod(lambda r: [([r.floats(r.n, r.m), r.floats(r.m)], {}), ([r.floats(r.n, 2), None], {})])
    assert check_op(Rows, backends=()).cases == 6


def test_no_value_of_a_required_attribute_is_guessed():
    @op("test.scaled")
    class Scaled:
        x: Operand
        k: Attr[int]

        def infer(self):
            return self.x

        def reference(self):
            return self.x * self.k

    with pytest.raises(AssertionError, match="no guessing a value of its attribute 'k'"):
        check_op(Scaled, backends=())


def test_a_refusal_on_purpose_is_reported():
    cap = declare(expression=None)
    triton.refuses("test.cap", "nobody needs it there")
    assert check_op(cap).backends["triton"] == "nobody needs it there"
    declare(onnx=None, expression=None)
    onnxruntime.lowers("test.cap", check=lambda n: None if n.result.dtype == "f32" else "f32 only")(cap_onnx)
    text = check_op(cap, backends=("onnxruntime",)).backends["onnxruntime"]
    assert text.startswith("6 cases")
    assert text.endswith("; f32 only")


@triton_package.jit
def copy_kernel(x_ptr, y_ptr, n, EARLY: tl.constexpr, BLOCK: tl.constexpr = 8):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(1):
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)
        if EARLY:
            break


def copied(op, early):
    x = op.x.contiguous()
    y = torch.empty_like(x)
    triton.launch(copy_kernel, -(-x.numel() // 8), x, y, x.numel(), EARLY=early)
    return y


def test_what_only_the_interpreter_takes_is_found():
    """It runs kernels as Python, which has `break`."""
    cap = declare(elementwise=False, reference=lambda s: s.x.clone(), onnx=None, expression=None)
    triton.lowers("test.cap")(lambda op: copied(op, False))
    assert "; 2 kernels compile for sm_90" in check_op(cap, backends=("triton",)).backends["triton"]
    triton.lowers("test.cap")(lambda op: copied(op, True))
    with pytest.raises(AssertionError, match=r"kernel copy_kernel does not compile for sm_90(?s:.*)[Bb]reak"):
        check_op(cap, backends=("triton",))


def test_unknown_ops_are_named():
    with pytest.raises(TypeError, match=r"is no op(?s:.*)@moec\.ir\.op"):
        check_op(torch.nn.Linear)
    with pytest.raises(CompileError, match=r"unknown op 'test\.cap'"):
        check_op("test.cap")
