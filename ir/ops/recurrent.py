"""`recurrent.*`: one layer in one direction of a recurrent network, over a sequence of any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import TensorType

Tensor = torch.Tensor
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _check(x: TensorType, w: TensorType, r: TensorType, gates: int, biases: list[TensorType | None],
           states: list[TensorType]) -> TensorType:  # fmt: skip
    """The type of the rows [T, B, H]. Raises CompileError."""
    given = [t for t in (x, w, r, *biases, *states) if t is not None]
    one = len({t.dtype for t in given}) == 1 and x.dtype.is_wide_float
    require(one, f"needs equal float dtypes, got {', '.join(str(t.dtype) for t in given)}")
    require(x.rank == 3 and w.rank == r.rank == 2, f"x {x}, w {w} and r {r} must have the ranks 3, 2 and 2")
    hidden = r.shape[1]
    require(isinstance(hidden, int) and hidden > 0, f"the hidden size of r {r} must be known and positive")
    require(r.shape[0] == gates * hidden, f"r {r}, expected [{gates} · {hidden}, {hidden}]")
    require(w.shape == (gates * hidden, x.shape[2]), f"w {w}, expected [{gates * hidden}, {x.shape[2]}] for x {x}")
    for b in biases:
        require(b is None or b.shape == (gates * hidden,), f"bias {b}, expected [{gates * hidden}]")
    for s in states:
        require(s.shape == (x.shape[1], hidden), f"state {s}, expected [{x.shape[1]}, {hidden}]")
    return x.with_shape((*x.shape[:2], hidden))


def _run(x: Tensor, step: Step, state: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, ...]:
    """Rows [T, B, H] of the first state after each step, and the last states, in the dtype of x; computed in f32 at
    least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    state = tuple(s.to(wide) for s in state)
    rows = []
    for row in x.to(wide).flip(0) if reverse else x.to(wide):
        state = step(row, state)
        rows.append(state[0])
    y = torch.stack(rows[::-1] if reverse else rows) if rows else x.new_zeros(0, *state[0].shape)
    return y.to(x.dtype), *(s.to(x.dtype, copy=True) for s in state)


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _samples(r: Any, gates: int) -> tuple[list[Any], Any, Any]:
    """x, w, r; a bias; a state."""
    d, hidden = r.k, 3
    x, w, rec = r.floats(r.n, r.m, d), r.floats(gates * hidden, d), r.floats(gates * hidden, hidden)
    return [x, w, rec], r.floats(gates * hidden), r.floats(r.m, hidden)


@op("recurrent.lstm", results=3)
class LSTM:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000): x [T, B, D], w [4H, D], r [4H, H],
    bias [4H], states h, c [B, H] → rows [T, B, H], last h, c [B, H]. For each t, from the last on if `reverse`:

        i, f, g, o = the quarters of x_t wᵀ + h rᵀ + bias
        c ← σ(f) · c + σ(i) · tanh(g)
        h ← σ(o) · tanh(c)
    """

    x: Operand
    w: Operand
    r: Operand
    bias: OptionalOperand
    h: Operand
    c: Operand
    reverse: Attr[bool] = False

    def infer(self) -> tuple[TensorType, ...]:
        return _check(self.x, self.w, self.r, 4, [self.bias], [self.h, self.c]), self.h, self.c

    def reference(self) -> tuple[Tensor, ...]:
        w, r, bias = _wide(self.w, self.r, self.bias)

        def step(row: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, c = state
            i, f, g, o = (F.linear(row, w, bias) + F.linear(h, r)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

        return _run(self.x, step, (self.h, self.c), self.reverse)

    def undefined(self) -> bool:
        return overflows(self.x, self.w, self.r, self.bias, self.h, self.c)

    @staticmethod
    def samples(r: Any) -> Any:
        given, bias, state = _samples(r, 4)
        yield [*given, bias, state, r.floats(r.m, 3)], {}
        yield [*given, None, state, state], {"reverse": True}


@op("recurrent.gru", results=2)
class GRU:
    """Gated recurrent unit (Cho et al. 2014) with the reset after the product: x [T, B, D], w [3H, D], r [3H, H],
    biases of both [3H], state h [B, H] → rows [T, B, H], last h [B, H]. For each t, from the last on if `reverse`:

        a, b = x_t wᵀ + bias, h rᵀ + r_bias, in thirds
        n = tanh(a₃ + σ(a₁ + b₁) · b₃)
        h ← (1 − z) · n + z · h with z = σ(a₂ + b₂)
    """

    x: Operand
    w: Operand
    r: Operand
    bias: OptionalOperand
    r_bias: OptionalOperand
    h: Operand
    reverse: Attr[bool] = False

    def infer(self) -> tuple[TensorType, ...]:
        return _check(self.x, self.w, self.r, 3, [self.bias, self.r_bias], [self.h]), self.h

    def reference(self) -> tuple[Tensor, ...]:
        w, r, bias, r_bias = _wide(self.w, self.r, self.bias, self.r_bias)

        def step(row: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = state
            a, b = F.linear(row, w, bias).chunk(3, -1), F.linear(h, r, r_bias).chunk(3, -1)
            z = torch.sigmoid(a[1] + b[1])
            n = torch.tanh(a[2] + torch.sigmoid(a[0] + b[0]) * b[2])
            return ((1 - z) * n + z * h,)

        return _run(self.x, step, (self.h,), self.reverse)

    def undefined(self) -> bool:
        return overflows(self.x, self.w, self.r, self.bias, self.r_bias, self.h)

    @staticmethod
    def samples(r: Any) -> Any:
        given, bias, state = _samples(r, 3)
        yield [*given, bias, r.floats(9), state], {}
        yield [*given, None, None, state], {"reverse": True}


@op("recurrent.rnn", results=2)
class RNN:
    """Elman's network (1990): x [T, B, D], w [H, D], r [H, H], bias [H], state h [B, H] → rows [T, B, H], last h
    [B, H]. For each t, from the last on if `reverse`: h ← `activation`(x_t wᵀ + h rᵀ + bias), "tanh" or "relu"."""

    x: Operand
    w: Operand
    r: Operand
    bias: OptionalOperand
    h: Operand
    activation: Attr[str] = "tanh"
    reverse: Attr[bool] = False

    def infer(self) -> tuple[TensorType, ...]:
        require(self.activation in ("tanh", "relu"), f"activation {self.activation!r} is neither 'tanh' nor 'relu'")
        return _check(self.x, self.w, self.r, 1, [self.bias], [self.h]), self.h

    def reference(self) -> tuple[Tensor, ...]:
        w, r, bias = _wide(self.w, self.r, self.bias)
        act = torch.tanh if self.activation == "tanh" else torch.relu

        def step(row: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (act(F.linear(row, w, bias) + F.linear(state[0], r)),)

        return _run(self.x, step, (self.h,), self.reverse)

    def undefined(self) -> bool:
        return overflows(self.x, self.w, self.r, self.bias, self.h)

    @staticmethod
    def samples(r: Any) -> Any:
        given, bias, state = _samples(r, 1)
        yield [*given, bias, state], {}
        yield [*given, None, state], {"reverse": True, "activation": "relu"}
