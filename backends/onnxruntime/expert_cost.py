"""What the forms of grouped experts cost on a CPU: time by token count, ONNX nodes, time to load a session.

The model is linear. A product reads its weights once and then computes (the two barely overlap in ONNX Runtime's
kernels: bytes / BANDWIDTH + FLOPs / PEAK), each node is dispatched, and each form adds what it does beside: packing
weights, copying them out of a stack, multiplying what nobody asked for. Tokens choose experts evenly. Times are those
of one core; the constants are fitted to `make bench-experts`, which prints predictions beside measurements. Choices
depend on ratios only, which differ less between machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# of one core; f32
BANDWIDTH = 17e9  # bytes/s of weights that are not in a cache
PEAK = 110e9  # FLOP/s
PACK = 11e9  # bytes/s that com.microsoft.MoE packs, of experts with two rows at least
COPY = 8e9  # bytes/s that a Gather takes a matrix out of the stack with
NODE = 1.7e-6  # s to dispatch a node
PART = 1.3e-6  # s of a product without rows, its share of Split and Concat with it
BRANCH = 3.5e-6  # s of an If
STEP = 14e-6  # s of a step of a Loop, its nodes with it
# com.microsoft.QMoE by bits: bytes/s of codes and scales, FLOP/s
QMOE = {8: (7.0e9, 45e9), 4: (7.0e9, 60e9)}
# com.microsoft.MatMulNBits
NBITS = {8: (11e9, 45e9), 4: (8e9, 60e9)}
# s to load a graph of n nodes: n · LOAD + n² · LOAD_SQUARED
LOAD = 60e-6
LOAD_SQUARED = 3e-9
LOAD_WORTH = 10.0  # s of loading that weigh as much as being slower by the time of the fastest form

TOKENS = (1, 8, 64, 512)
"""Token counts that count alike where a graph leaves theirs open: decoding, in batches, prefill."""


@dataclass(frozen=True)
class Layer:
    """`num` experts of `width` × `hidden` (d × f), `k` of them for each token; `bits` of stored integer weights that
    products take as they are, else None; `itemsize`: bytes of a weight in the products."""

    num: int
    k: int
    width: int
    hidden: int
    bits: int | None = None
    itemsize: int = 4

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.width * self.hidden

    def used(self, tokens: int) -> float:
        """Experts that have rows."""
        return self.num * (1 - (1 - self._share) ** tokens)

    def used_twice(self, tokens: int) -> float:
        """Experts that have two rows at least."""
        p = self._share
        return max(0.0, self.used(tokens) - self.num * tokens * p * (1 - p) ** (tokens - 1))

    @property
    def _share(self) -> float:
        return min(1.0, self.k / max(1, self.num))


@dataclass(frozen=True)
class Cost:
    """`seconds` by token count, `nodes` of the layer, `load` in seconds of all layers that take the form."""

    seconds: dict[int, float]
    nodes: int
    load: float

    def to_dict(self) -> dict[str, object]:
        """Times in ms, loading in seconds."""
        return {
            "ms": {t: round(s * 1e3, 4) for t, s in self.seconds.items()},
            "nodes": self.nodes,
            "load_seconds": round(self.load, 2),
        }


def cost(form: str, layer: Layer, tokens: Sequence[int], layers: int, others: int = 0) -> Cost:
    """Of one of `layers` such layers, where a graph has `others` more nodes."""
    count = nodes(form, layer)
    total = others + layers * count
    load = total * LOAD + total**2 * LOAD_SQUARED
    return Cost({t: seconds(form, layer, t) for t in tokens}, count, load)


def nodes(form: str, layer: Layer) -> int:
    """ONNX nodes, those of bodies with them."""
    each = {"unrolled": 2, "if": 9, "moe": 0, "loop": 0, "dense": 0}[form]
    return each * layer.num + {"unrolled": 24, "if": 18, "moe": 9, "loop": 34, "dense": 22}[form]


def seconds(form: str, layer: Layer, tokens: int) -> float:
    """A layer's time for so many tokens."""
    size, flops = layer.weights * layer.itemsize, 2 * layer.weights * tokens * layer.k
    used = layer.used(tokens)
    read = used * size / BANDWIDTH + flops / PEAK
    if layer.bits is not None and form in ("moe", "unrolled", "if"):
        rates = (QMOE if form == "moe" else NBITS)[layer.bits]
        read = used * size * layer.bits / 32 / rates[0] + flops / rates[1]
    match form:
        case "unrolled":
            return read + NODE * 24 + 2 * PART * layer.num
        case "if":
            return read + NODE * (18 + 6 * used) + BRANCH * layer.num
        case "moe":
            packed = 0.0 if layer.bits else layer.used_twice(tokens) * size / PACK
            return read + packed + NODE * 9
        case "loop":
            return read + used * size / COPY + NODE * 24 + STEP * used
        case "dense":
            every = layer.num * (size / BANDWIDTH + 2 * layer.weights * tokens / PEAK)
            return every + NODE * 20
    raise ValueError(form)


def best(costs: dict[str, Cost]) -> str:
    """The form with the least cost: how much slower than the fastest it is, on average over the token counts, and
    loading in units of LOAD_WORTH; of equal ones the first."""
    counts = next(iter(costs.values())).seconds

    def slower(form: str) -> float:
        ratios = [costs[form].seconds[t] / min(c.seconds[t] for c in costs.values()) for t in counts]
        return sum(ratios) / len(ratios) + costs[form].load / LOAD_WORTH

    return min(costs, key=slower)
