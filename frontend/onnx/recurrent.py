"""RNN, GRU and LSTM: our ops, or with other activations and resets a small number of steps one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.control import MOST_ITERATIONS
from moec.frontend.onnx.registry import imports
from moec.ir import Value

Strings = Sequence[str] | None
Floats = Sequence[float] | None
Step = Callable[["_Cell", Value, list[Value]], list[Value]]
_ACTIVATIONS = {"sigmoid", "tanh", "relu"}


class _Cell:
    """The weights of one direction: x [T, B, I] · w [G·H, I] + b is `given`; r [H, H] · G and c [H] · G are the gates'
    recurrent weights and biases, f its activations."""

    def __init__(self, c: ImportContext, number: int, w: Value, r: Value, bias: Value | None, size: int, f: list[str]):
        self.c, self.size, self.f = c, size, f
        self.w, self.r = (c.reshape(c.slice(v, 0, number, number + 1), v.shape[1:]) for v in (w, r))
        rows = self.w.shape[0]
        if rows != self.r.shape[0] or not isinstance(rows, int) or rows % size or self.r.shape[1] != size:
            raise c.refuse(f"weights {w.type} and {r.type} of {size} hidden elements", code="type")
        self.gates = rows // size
        both = None if bias is None else c.reshape(c.slice(bias, 0, number, number + 1), bias.shape[1:])
        self.wb, self.rb = (None if both is None else c.slice(both, 0, i * rows, (i + 1) * rows) for i in (0, 1))

    def given(self, x: Value) -> Value:
        return self.c.b.linear(x, self.w, self.wb)

    def gate(self, v: Value, i: int, axis: int) -> Value:
        return self.c.slice(v, axis, i * self.size, (i + 1) * self.size)

    def sorted(self, v: Value | None, order: Sequence[int]) -> Value | None:
        """The gates' rows in another order."""
        if v is None or len(order) == 1:
            return v
        return self.c.concat([self.gate(v, i, 0) for i in order], 0)

    def whole(self, name: str, order: Sequence[int], x: Value, state: list[Value], backwards: bool) -> list[Value]:
        """All steps by an op of ours: rows [T, B, H] and the last states."""
        w, r, wb, rb = (self.sorted(v, order) for v in (self.w, self.r, self.wb, self.rb))
        attrs: dict[str, object] = {"reverse": backwards}
        if name == "recurrent.gru":
            biases = [wb, rb]
        else:
            biases = [None if wb is None or rb is None else self.c.b.add(wb, rb)]
        if name == "recurrent.rnn":
            attrs["activation"] = self.f[0]
        return list(self.c.b.op(name, [x, w, r, *biases, *state], attrs))

    def recurrent(self, h: Value, first: int, last: int) -> Value:
        """h times the recurrent weights of gates first … last − 1, and their biases."""
        part = [None if v is None else self.c.slice(v, 0, first * self.size, last * self.size)
                for v in (self.r, self.rb)]  # fmt: skip
        return self.c.b.linear(h, *part)

    def activate(self, i: int, x: Value) -> Value:
        return self.c.b.op(f"math.{self.f[i]}", (x,))


def _rnn(cell: _Cell, x: Value, state: list[Value]) -> list[Value]:
    return [cell.activate(0, cell.c.b.add(x, cell.recurrent(state[0], 0, 1)))]


def _lstm(cell: _Cell, x: Value, state: list[Value]) -> list[Value]:
    """Gates input, output, forget, cell (Hochreiter & Schmidhuber 1997; Gers et al. 2000)."""
    b = cell.c.b
    h, memory = state
    all_ = b.add(x, cell.recurrent(h, 0, 4))
    i, o, f, g = (cell.activate(int(k == 3), cell.gate(all_, k, 1)) for k in range(4))
    memory = b.add(b.mul(f, memory), b.mul(i, g))
    return [b.mul(o, cell.activate(2, memory)), memory]


def _gru(cell: _Cell, x: Value, state: list[Value]) -> list[Value]:
    """Gates update, reset, hidden (Cho et al. 2014), the reset before the product."""
    h = state[0]
    return _gru_step(cell, x, h, lambda r: cell.recurrent(cell.c.b.mul(r, h), 2, 3))


def _gru_linear(cell: _Cell, x: Value, state: list[Value]) -> list[Value]:
    """The reset after the product, as in cuDNN."""
    h = state[0]
    return _gru_step(cell, x, h, lambda r: cell.c.b.mul(r, cell.recurrent(h, 2, 3)))


def _gru_step(cell: _Cell, x: Value, h: Value, hidden: Callable[[Value], Value]) -> list[Value]:
    b = cell.c.b
    both = b.add(cell.c.slice(x, 1, 0, 2 * cell.size), cell.recurrent(h, 0, 2))
    z, r = (cell.activate(0, cell.gate(both, k, 1)) for k in range(2))
    n = cell.activate(1, b.add(cell.gate(x, 2, 1), hidden(r)))
    return [b.add(b.mul(b.sub(1.0, z), n), b.mul(z, h))]


# our op for a cell with the usual activations: its name, and where its gates lie among ONNX's
_WHOLE: dict[Step, tuple[str, tuple[int, ...]]] = {
    _lstm: ("recurrent.lstm", (0, 2, 3, 1)), _gru_linear: ("recurrent.gru", (1, 0, 2)), _rnn: ("recurrent.rnn", (0,)),
}  # fmt: skip


def _run(c: ImportContext, step: Step, default: list[str], x: Value, w: Value, r: Value, bias: Value | None,
         states: list[Value | None], *, activations: Strings, direction: str, hidden_size: int | None,
         layout: int | None, refused: dict[str, object]) -> list[Value]:  # fmt: skip
    """Y [T, D, B, H] and the last states [D, B, H]; batches first where layout is 1."""
    for name, value in refused.items():
        if value is not None and value != 0:
            raise c.refuse(f"with {name}")
    c.floats(x, w, r, bias, *states)
    if layout:
        x = c.transpose(x, (1, 0, 2))
        states = [None if s is None else c.transpose(s, (1, 0, 2)) for s in states]
    steps, batch = x.shape[:2]
    for s in states:
        if s is not None:
            c.need(s.shape[1], batch)
    size = r.shape[2]
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(direction)
    if ways is None or w.shape[0] != len(ways) or hidden_size not in (None, size):
        raise c.refuse(f"direction {direction!r} and hidden_size {hidden_size} of weights {r.type}", code="type")
    kinds = [a.lower() for a in activations or default * len(ways)][: len(default) * len(ways)]
    if len(kinds) != len(default) * len(ways) or not set(kinds) <= _ACTIVATIONS:
        raise c.refuse(f"activations {kinds}")
    name, order = _WHOLE.get(step, ("", ()))
    if kinds != [a.lower() for a in default] * len(ways) and not (step is _rnn and "sigmoid" not in kinds):
        name = ""
    if not isinstance(size, int) or (not name and not (isinstance(steps, int) and 0 < steps <= MOST_ITERATIONS)):
        raise c.refuse(f"over {steps} steps of {size} elements; 1 to {MOST_ITERATIONS} are written out")
    rows, last = [], []
    for d, backwards in enumerate(ways):
        cell = _Cell(c, d, w, r, bias, size, kinds[d * len(default) : (d + 1) * len(default)])
        state = [c.full((batch, size), 0.0, x.dtype) if s is None
                 else c.reshape(c.slice(s, 0, d, d + 1), (batch, size)) for s in states]  # fmt: skip
        if name:
            y, *state = cell.whole(name, order, x, state, backwards)
            rows.append(c.reshape(y, (steps, 1, batch, size)))
            last.append([c.reshape(s, (1, batch, size)) for s in state])
            continue
        given = cell.given(x)
        seen: list[Value] = []
        for t in reversed(range(steps)) if backwards else range(steps):
            state = step(cell, c.reshape(c.slice(given, 0, t, t + 1), given.shape[1:]), state)
            seen.append(c.reshape(state[0], (1, 1, batch, size)))
        rows.append(c.concat(seen[::-1] if backwards else seen, 0))
        last.append([c.reshape(s, (1, batch, size)) for s in state])
    results = [c.concat(rows, 1), *(c.concat([s[i] for s in last], 0) for i in range(len(states)))]
    if layout:
        results = [c.transpose(results[0], (2, 0, 1, 3)), *(c.transpose(s, (1, 0, 2)) for s in results[1:])]
    return results


@imports("RNN", since=7)
def rnn(c: ImportContext, x: Value, w: Value, r: Value, bias: Value | None = None, lengths: Value | None = None,
        h: Value | None = None, *, activation_alpha: Floats, activation_beta: Floats, activations: Strings,
        clip: float | None, direction: str, hidden_size: int | None, layout: int | None) -> list[Value]:  # fmt: skip
    return _run(c, _rnn, ["Tanh"], x, w, r, bias, [h], activations=activations, direction=direction,
                hidden_size=hidden_size, layout=layout,
                refused={"clip": clip, "sequence_lens": lengths})  # fmt: skip


@imports("GRU", since=7)
def gru(c: ImportContext, x: Value, w: Value, r: Value, bias: Value | None = None, lengths: Value | None = None,
        h: Value | None = None, *, activation_alpha: Floats, activation_beta: Floats, activations: Strings,
        clip: float | None, direction: str, hidden_size: int | None, layout: int | None,
        linear_before_reset: int) -> list[Value]:  # fmt: skip
    step = _gru_linear if linear_before_reset else _gru
    return _run(c, step, ["Sigmoid", "Tanh"], x, w, r, bias, [h], activations=activations, direction=direction,
                hidden_size=hidden_size, layout=layout,
                refused={"clip": clip, "sequence_lens": lengths})  # fmt: skip


@imports("LSTM", since=7)
def lstm(c: ImportContext, x: Value, w: Value, r: Value, bias: Value | None = None, lengths: Value | None = None,
         h: Value | None = None, memory: Value | None = None, peepholes: Value | None = None, *,
         activation_alpha: Floats, activation_beta: Floats, activations: Strings, clip: float | None, direction: str,
         hidden_size: int | None, input_forget: int, layout: int | None) -> list[Value]:  # fmt: skip
    return _run(c, _lstm, ["Sigmoid", "Tanh", "Tanh"], x, w, r, bias, [h, memory], activations=activations,
                direction=direction, hidden_size=hidden_size, layout=layout,
                refused={"clip": clip, "sequence_lens": lengths, "peepholes": peepholes,
                         "input_forget": input_forget})  # fmt: skip
