"""The recurrent layers that stand in for torch's, see moec.frontend.recurrent."""

from __future__ import annotations

from moec.frontend.aten.registry import lowers
from moec.frontend.context import Context
from moec.ir import Value


@lowers("moec_frontend::lstm")
def lstm(
    c: Context, x: Value, w: Value, r: Value, bias: Value | None, hidden: Value, cell: Value, reverse: bool
) -> list[Value]:
    return list(c.b.op("recurrent.lstm", [x, w, r, bias, hidden, cell], {"reverse": reverse}))


@lowers("moec_frontend::gru")
def gru(
    c: Context, x: Value, w: Value, r: Value, bias: Value | None, r_bias: Value | None, h: Value, reverse: bool
) -> list[Value]:
    return list(c.b.op("recurrent.gru", [x, w, r, bias, r_bias, h], {"reverse": reverse}))


@lowers("moec_frontend::rnn")
def rnn(
    c: Context, x: Value, w: Value, r: Value, bias: Value | None, h: Value, activation: str, reverse: bool
) -> list[Value]:
    return list(c.b.op("recurrent.rnn", [x, w, r, bias, h], {"activation": activation, "reverse": reverse}))
