"""What the forms of grouped experts cost on a CPU: time by token count, ONNX nodes, time to load a session.

The model is linear. A product reads its weights and then computes (the two barely overlap in ONNX Runtime's kernels:
bytes / bandwidth + FLOPs / peak), each node is dispatched, and each form adds what it does beside: packing weights,
copying them out of a stack, multiplying what nobody asked for. Tokens choose experts evenly. Times are those of one
core; the constants are fitted to `make bench-experts`, which prints predictions beside measurements (most within 30%).
Choices depend on ratios only, which differ less between machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# of one core, in f32
READ_ROW = 24e9  # bytes/s of weights that one row is multiplied with
READ_ROWS = 13e9  # bytes/s of those that several are
PEAK = 160e9  # FLOP/s
READ_ALL, PEAK_ALL = 14e9, 99e9  # of products of all experts at once
NODE = 0.8e-6  # s to dispatch a node
PART = 1.25e-6  # s of a product without rows, its share of Split and Concat with it
BRANCH = 4.8e-6  # s of an If
STEP = 8.6e-6  # s of a step of a Loop, its nodes with it
MOVE = 0.7e-9  # s for each number that is gathered, activated or added up
PACK = 21e9  # bytes/s that com.microsoft.MoE packs, of experts that several rows go to
SWIGLU = 25e-9  # s for each number that it activates
COPY = 11e9  # bytes/s that a matrix is taken out of the stack with
# with stored integers, by bits: bytes/s of codes, FLOP/s, s for each number that is activated, rounded or moved
QMOE = {8: (20e9, 170e9, 9.5e-9), 4: (19e9, 124e9, 10e-9)}
NBITS = {8: (21e9, 175e9, 1.5e-9), 4: (22e9, 117e9, 1.6e-9)}  # com.microsoft.MatMulNBits
QMOE_CALL, MOE_CALL = 17e-6, 25e-6  # s

LOAD, LOAD_SQUARED = 0.18e-3, 4.4e-9  # s to load a graph of n nodes: n · LOAD + n² · LOAD_SQUARED
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
    size, rows = layer.weights * layer.itemsize, tokens * layer.k
    used, several, flops = layer.used(tokens), layer.used_twice(tokens), 2 * layer.weights * rows
    moved = rows * (5 * layer.width + 3 * layer.hidden)
    if layer.bits is not None and form in ("moe", "unrolled", "if"):
        rates = (QMOE if form == "moe" else NBITS)[layer.bits]
        read = used * layer.weights * layer.bits / 8 / rates[0] + flops / rates[1]
        if form == "moe":
            return read + QMOE_CALL + rates[2] * rows * (layer.width + layer.hidden)
        move = rates[2]
    else:
        read, move = (used - several) * size / READ_ROW + several * size / READ_ROWS + flops / PEAK, MOVE
    match form:
        case "unrolled":
            return read + move * moved + NODE * 24 + 2 * PART * layer.num
        case "if":
            return read + move * moved + NODE * (18 + 6 * used) + BRANCH * layer.num
        case "moe":
            return read + several * size / PACK + SWIGLU * rows * layer.hidden + MOE_CALL
        case "loop":
            return read + move * moved + used * size / COPY + NODE * 24 + STEP * used
        case "dense":
            products = size / READ_ALL + 2 * layer.weights * tokens / PEAK_ALL
            return layer.num * (products + MOVE * tokens * (layer.width + 3 * layer.hidden)) + NODE * 20
    raise ValueError(form)


def best(costs: dict[str, Cost]) -> str:
    """The form with the least cost: how much slower than the fastest it is, on average over the token counts, and
    loading in units of LOAD_WORTH; of equal ones the first."""
    counts = next(iter(costs.values())).seconds

    def slower(form: str) -> float:
        ratios = [costs[form].seconds[t] / min(c.seconds[t] for c in costs.values()) for t in counts]
        return sum(ratios) / len(ratios) + costs[form].load / LOAD_WORTH

    return min(costs, key=slower)
