"""`torch.lstm`, `torch.gru` and `torch.rnn_*` while tracing: ops of ours for each layer and direction, which hold for
sequences of any length; torch would write out each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moec.ir import lookup

Tensor = torch.Tensor


def _reference(name: str, operands: Sequence[Tensor | None], **attrs: Any) -> tuple[Tensor, ...]:
    return tuple(lookup(name).instance(operands, attrs).reference())


@torch.library.custom_op("moec_frontend::lstm", mutates_args=())
def lstm(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, memory = _reference("recurrent.lstm", (x, w, r, bias, hidden, cell), reverse=reverse)
    return y, last, memory


@lstm.register_fake
def _(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[1], r.shape[1]), torch.empty_like(hidden), torch.empty_like(cell)


@torch.library.custom_op("moec_frontend::gru", mutates_args=())
def gru(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, r_bias: Tensor | None, h: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    y, h = _reference("recurrent.gru", (x, w, r, bias, r_bias, h), reverse=reverse)
    return y, h


@gru.register_fake
def _(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, r_bias: Tensor | None, h: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[1], r.shape[1]), torch.empty_like(h)


@torch.library.custom_op("moec_frontend::rnn", mutates_args=())
def rnn(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, h: Tensor, activation: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    y, h = _reference("recurrent.rnn", (x, w, r, bias, h), activation=activation, reverse=reverse)
    return y, h


@rnn.register_fake
def _(
    x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None, h: Tensor, activation: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[1], r.shape[1]), torch.empty_like(h)


def _layer(kind: str, x: Tensor, parameters: Sequence[Tensor], states: list[Tensor], reverse: bool) -> Any:
    """One direction of one layer: rows, last states."""
    w, r, *biases = parameters
    ops = torch.ops.moec_frontend
    if kind == "gru":
        return ops.gru(x, w, r, *(biases or (None, None)), *states, reverse)
    bias = biases[0] + biases[1] if biases else None
    if kind == "lstm":
        return ops.lstm(x, w, r, bias, *states, reverse)
    return ops.rnn(x, w, r, bias, *states, kind.removeprefix("rnn_"), reverse)


def _network(
    kind: str, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All layers, as `torch.lstm` has them: the rows of the directions side by side go into the next layer."""
    ways, each = (2 if bidirectional else 1), (4 if has_biases else 2)
    x = x.transpose(0, 1) if batch_first else x
    last: list[Sequence[Tensor]] = []
    for layer in range(num_layers):
        rows = []
        for way in range(ways):
            at = layer * ways + way
            y, *ends = _layer(
                kind, x, parameters[at * each : (at + 1) * each], [s[at] for s in states], reverse=way == 1
            )
            rows.append(y)
            last.append(ends)
        x = torch.cat(rows, -1) if ways == 2 else rows[0]
    x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.stack(s) for s in zip(*last, strict=True))


_KINDS = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "rnn_tanh", torch.rnn_relu: "rnn_relu"}
_ARGUMENTS = 9  # of a call without packed sequences


class RecurrentMode(TorchFunctionMode):
    """Replaces calls on padded sequences [T, B, D]. Packed ones, projections of the hidden state and dropout that is on
    stay torch's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kind = _KINDS.get(func)
        if kind is not None and len(args) == _ARGUMENTS and not kwargs and isinstance(args[3], bool):
            x, states, parameters, *rest = args
            states = list(states) if kind == "lstm" else [states]
            has_biases, num_layers, dropout, train, bidirectional, _ = rest
            count = num_layers * (2 if bidirectional else 1) * (4 if has_biases else 2)
            if x.dim() == 3 and len(parameters) == count and not (train and dropout):
                return _network(kind, x, states, parameters, *rest)
        return func(*args, **(kwargs or {}))
