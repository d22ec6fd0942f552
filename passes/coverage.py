"""Which linear and expert weights of a graph are stored as FP8 or integer codes, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moec.ir import DType, Graph, Location, Node, Quantization, Value
from moec.ir.ops.block_codes import CODES

# ops that a router's scores may pass through between the projection and moe.route
_SHAPE_OPS = ("tensor.reshape", "tensor.transpose", "tensor.expand", "tensor.slice")


@dataclass(frozen=True)
class Left:
    """A weight that stays in high precision."""

    weight: str
    nbytes: int
    reason: str
    location: Location


@dataclass(frozen=True)
class Coverage:
    """Bytes of linear and expert weights, counted in the dtype they are computed in."""

    quantised_bytes: int
    candidate_bytes: int
    left: tuple[Left, ...]
    by_dtype: dict[str, int] = field(default_factory=dict)  # of the quantised: what they are stored as

    @property
    def share(self) -> float:
        """Quantised / candidate bytes; 1 where there is nothing to quantise."""
        return self.quantised_bytes / self.candidate_bytes if self.candidate_bytes else 1.0

    def __str__(self) -> str:
        stored = f" ({', '.join(f'{d} {n:,}' for d, n in self.by_dtype.items())})" if self.by_dtype else ""
        total = f"{self.candidate_bytes:,} bytes of linear and expert weights"
        lines = [f"{self.share:.1%} of {total} are stored as codes{stored}"]
        lines += [f"  left {x.weight} ({x.nbytes:,} bytes): {x.reason}" for x in self.left]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        left = [{"weight": x.weight, "bytes": x.nbytes, "reason": x.reason} for x in self.left]
        return {
            "share": self.share,
            "quantised_bytes": self.quantised_bytes,
            "candidate_bytes": self.candidate_bytes,
            "by_dtype": dict(self.by_dtype),
            "left": left,
        }


def root_weight(value: Value) -> Value | None:
    """The weight that a value is, or that it is a cast, transpose or reshape of; None for anything computed."""
    while value.weight is None:
        node = value.producer
        if node is None or node.op not in ("math.cast", *_SHAPE_OPS):
            return None
        first = node.operands[0]
        assert first is not None
        value = first
    return value


def candidates(node: Node) -> Iterator[Value]:
    """The operands of a node that hold linear or expert weights, quantised or not."""
    if node.op == "linear.linear":
        yield node.operand("weight")
    elif node.op == "linear.matmul":
        yield from (v for v in node.operands if v is not None and root_weight(v) is not None)
    elif node.op in ("moe.experts", "quant.scaled_experts"):
        yield from (node.operand("gate_up"), node.operand("down"))
    elif node.op == "quant.scaled_linear":
        yield node.operand("weight")


def router_projections(graph: Graph) -> set[Node]:
    """The linear nodes whose result reaches the logits or bias of a `moe.route` through casts, shape ops and
    elementwise math only."""
    found: set[Node] = set()
    seen: set[Value] = set()
    todo = [v for n in graph.nodes if n.op == "moe.route" for v in n.operands if v is not None]
    while todo:
        value = todo.pop()
        node = value.producer
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op in ("linear.linear", "linear.matmul"):
            found.add(node)
        elif node.opdef.elementwise or node.op in _SHAPE_OPS:
            todo += [v for v in node.operands if v is not None]
    return found


def why_left(node: Node, value: Value, quantization: Quantization, routers: set[Node]) -> str | None:
    """Why `value`, a weight operand of `node`, stays as it is; None where it can be quantised."""
    if node in routers:
        return "router projection"
    weight = root_weight(value)
    if kept(node, weight, quantization.keep):
        return "kept by request"
    if node.op == "linear.matmul":
        return "matmul with a weight (canonicalise turns x @ wᵀ into linear)"
    if value.weight is None:
        return "computed in the graph, not a stored weight"
    if node.op == "linear.linear" and node.operand("x").type.rank < 2:
        return f"x {node.operand('x').type} has no token axis"
    if node.op == "moe.experts" and (node.operand("gate_up").weight is None or node.operand("down").weight is None):
        return "computed in the graph, not a stored weight"
    return None


def kept(node: Node, weight: Value | None, prefixes: tuple[str, ...]) -> bool:
    """Whether the node's module or the weight's name lies under one of `prefixes`."""
    name = weight.weight.name if weight is not None and weight.weight is not None else ""
    return any(node.location.under(p) or name == p or name.startswith(p + ".") for p in prefixes)


def quantized_coverage(graph: Graph, quantization: Quantization | None = None) -> Coverage:
    """What share of a graph's linear and expert weight bytes is stored as codes, read off the graph itself.

    A weight that several nodes use counts once; one stored in both forms counts as two. `quantization` gives
    the `keep` list that explains what was left.
    """
    quantization = quantization or Quantization()
    sizes: dict[tuple[str, str], int] = {}
    dtypes: dict[tuple[str, str], DType] = {}
    left: dict[tuple[str, str], Left] = {}
    for where, g in (("", graph), *graph.functions.items()):
        routers = router_projections(g)
        for node in g.nodes:
            for value in candidates(node):
                done = _codes(value)
                source = done or root_weight(value)
                if source is None or source.weight is None:
                    continue
                key = (where, source.weight.name)
                sizes[key] = math.prod(source.shape) * node.result.dtype.bits // 8
                if done is not None:
                    dtypes[key] = done.dtype
                else:
                    reason = why_left(node, value, quantization, routers) or "not quantised"
                    left[key] = Left(source.weight.name, sizes[key], reason, node.location)
    total = sum(sizes.values())
    by_dtype: dict[str, int] = {}
    for key, dtype in dtypes.items():
        by_dtype[dtype] = by_dtype.get(dtype, 0) + sizes[key]
    return Coverage(total - sum(x.nbytes for x in left.values()), total, tuple(left.values()), by_dtype)


def _codes(value: Value) -> Value | None:
    """The stored codes behind a weight operand, if that is what it is."""
    if value.producer is not None and value.producer.op == "quant.dequantize":
        value = value.producer.operand("codes")
    return value if value.weight is not None and value.dtype in CODES else None
