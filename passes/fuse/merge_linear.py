"""Linear layers on one input, to one wider layer whose result is split: fewer, larger products.

Not part of the default pipeline: the merged weights have names of their own, so that `Quantization.keep` and anything
else that goes by the names of weights has to know them; and a merged weight is a copy, in memory beside the tensors
of a live model. Put them before quantisation:

    moec.passes.default_pipeline().insert_after("fuse", MergeLinears())
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Node, TensorType, Value
from moec.ir.weight import joined_rows
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet

# how a projection reaches attention: by ops that leave each row to itself, and into a cache
_ON_THE_WAY = {
    "tensor.reshape", "tensor.transpose", "tensor.split", "tensor.slice", "tensor.expand", "tensor.concat",
    "math.mul", "math.cast", "math.clamp", "norm.rms", "norm.layer", "rope.apply", "linear.linear", "linear.matmul",
}  # fmt: skip


def _attention_of(v: Value, limit: int = 64) -> tuple[Node, frozenset[int]] | None:
    """The one attention that `v` flows into, and as which of q, k, v (0, 1, 2)."""
    found: dict[Node, set[int]] = {}
    seen = {v}
    stack = [v]
    while stack and len(seen) < limit:
        current = stack.pop()
        for user in current.users:
            if user.op == "attention.sdpa":
                found.setdefault(user, set()).update(i for i, o in enumerate(user.operands[:3]) if o is current)
            elif user.op in _ON_THE_WAY:
                fresh = [r for r in user.results if r not in seen]
                seen.update(fresh)
                stack += fresh
    if len(found) != 1:
        return None
    ((node, places),) = found.items()
    return node, frozenset(places)


def _check(m: Match, count: int) -> Refused | None:
    """Refuses what cannot be one weight."""
    weights, biases = [m.get(f"w{i}") for i in range(count)], [m.get(f"b{i}") for i in range(count)]
    for w in weights:
        if w.weight is None:
            return m.no("it is not a plain weight", at=w)
        if len(w.uses) > 1 or w.dtype != weights[0].dtype:
            return m.no(f"weight {w.weight.name!r} is used elsewhere too, or {w.dtype}", at=w)
    for b in biases:
        if (b is None) != (biases[0] is None):
            return m.no("some have a bias, others none")
        if b is not None and b.weight is None:
            return m.no("a bias is not a plain weight", at=b)
    if len({w.weight.name for w in weights}) < count:
        return m.no("it is one weight several times")
    return None


def _merged(b: Any, m: Match, count: int) -> tuple[Value, ...]:
    """One linear layer and its parts."""
    weights = [m.get(f"w{i}") for i in range(count)]
    biases = [m.get(f"b{i}") for i in range(count)]
    weight = _joined(b, weights)
    bias = None if biases[0] is None else _joined(b, biases)
    y = b.linear_linear(m.x, weight, bias)
    return tuple(b.split(y, axis=-1, sizes=tuple(w.shape[0] for w in weights)))


def _joined(b: Any, parts: list[Value]) -> Value:
    """Rows of several weights as one, computed when first needed."""
    held = [p.weight for p in parts if p.weight is not None]
    *lead, last = held[0].name.split(".")
    modules = "+".join((w.name.split(".")[-2:-1] or [w.name])[0] for w in held)
    name = ".".join([*lead[:-1], modules, last])
    rows = sum(p.shape[0] for p in parts)
    return b.weight(name, joined_rows(held), TensorType(parts[0].dtype, (rows, *parts[0].shape[1:])))


@dataclass(frozen=True)
class MergeProjections(Rewrite):
    """q = linear(x, Wq), k = linear(x, Wk), v = linear(x, Wv) of one attention → split(linear(x, [Wq Wk Wv])). With
    `latent`: the two projections of DeepSeek's latent attention, of which one gives both keys and values."""

    latent: bool = False

    @property
    def name(self) -> str:
        return "merge_latent_projections" if self.latent else "merge_projections"

    @property
    def _count(self) -> int:
        return 2 if self.latent else 3

    def pattern(self, p: Any, x: Any) -> Any:
        return tuple(p.linear_linear(x, p.any(f"w{i}"), p.optional(f"b{i}")) for i in range(self._count))

    def when(self, m: Match) -> Refused | None:
        reached = [_attention_of(r) for r in m.roots]
        nodes = {r[0] for r in reached if r is not None}
        if len(nodes) != 1 or None in reached:
            return m.no("they do not flow into one attention")
        wanted = [{0}, {1, 2}] if self.latent else [{0}, {1}, {2}]
        if [set(r[1]) for r in reached if r is not None] != wanted:
            return m.no("they are not queries, keys and values of the attention, in this order")
        return _check(m, self._count)

    def replace(self, b: Any, m: Match) -> Any:
        return _merged(b, m, self._count)


@dataclass(frozen=True)
class MergeGateUp(Rewrite):
    """swiglu(linear(x, Wg), linear(x, Wu)) → swiglu(split(linear(x, [Wg Wu])))"""

    def pattern(self, p: Any, x: Any) -> Any:
        gate, up = (p.linear_linear(x, p.any(f"w{i}"), p.optional(f"b{i}")) for i in range(2))
        return p.swiglu(gate, up)

    def when(self, m: Match) -> Refused | None:
        return _check(m, 2)

    def replace(self, b: Any, m: Match) -> Any:
        return b.swiglu(*_merged(b, m, 2))


@dataclass(frozen=True)
class MergeLinears(RuleSet):
    """Projections of one attention, and gate and up of one MLP."""

    rules: tuple[Rewrite, ...] = (MergeProjections(), MergeProjections(latent=True), MergeGateUp())
