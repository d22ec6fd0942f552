"""Where a graph chooses experts: the values that hold the routers' logits, whatever form the routing has."""

from __future__ import annotations

import torch

from moec.ir.dims import evaluate
from moec.ir.graph import Graph, Node, Value
from moec.ir.weight import TensorSource, Weight

_SELECTS = {"math.topk", "math.argmax", "math.sort", "moe.route"}
_SCORES = {"math.softmax", "math.sigmoid", "math.log_softmax"}
# between scores and selection (bias, groups, scaling): operand 0 or the one that is computed
_BETWEEN = _SCORES | {
    "math.add", "math.sub", "math.mul", "math.where", "math.topk", "math.sort", "math.sum", "math.amax",
    "math.max", "tensor.scatter_elements", "tensor.expand",
}  # fmt: skip
_SAME = {"math.cast", "tensor.reshape", "tensor.transpose"}
# what logits come from; anything else (a quotient of exponentials) may be scores in a form not known here
_PRODUCERS = {"linear.linear", "linear.matmul", "quant.scaled_linear", "tensor.split", "tensor.slice"}

PINS = ("ties", "some ties", "one expert", "experts in turn")


def router_logits(graph: Graph) -> list[Value]:
    """The float values [..., E] that a selection of experts is computed from, in order: the operand of the
    scoring function (softmax, sigmoid), or of the selection where there is none. Empty where the routing
    has a form that is not recognised."""
    found: dict[Value, None] = {}
    for node in graph.nodes:
        x = node.operands[0] if node.operands else None
        if node.op in _SELECTS and x is not None and x.dtype.is_float:
            logits = _logits(x)
            if logits is not None:
                found[logits] = None
    return list(found)


def selects_by_size(graph: Graph) -> bool:
    """Whether the graph chooses among floats, so that ties matter."""
    return any(n.op in _SELECTS and n.operands[0] is not None and n.operands[0].dtype.is_float for n in graph.nodes)


def selection_biases(graph: Graph) -> set[str]:
    """Names of the weights that are added to scores before experts are selected (DeepSeek-V3's correction bias)."""
    found: set[str] = set()
    for node in graph.nodes:
        added: list[Value | None] = [node.operand("bias")] if node.op == "moe.route" else []
        v = node.operands[0] if node.op in _SELECTS else None
        while v is not None and v.producer is not None and v.producer.op in (_BETWEEN | _SAME) - _SCORES:
            added += v.producer.operands if v.producer.op == "math.add" else []
            v = _computed_operand(v.producer)
        for bias in added:
            while bias is not None and bias.producer is not None and bias.producer.op in _SAME:
                bias = bias.producer.operands[0]
            if bias is not None and bias.weight is not None:
                found.add(bias.weight.name)
    return found


def without_biases(graph: Graph, names: set[str]) -> Graph | None:
    """The graph with these weights zero, under which tied logits are tied choices; None where it lacks one of them
    (and may hold what was computed from it)."""
    if not names or not names <= graph.weights.keys():
        return None
    graph = graph.clone()
    for name in names:
        weight = graph.weights[name].weight
        assert weight is not None
        shape = [evaluate(n, {}) for n in weight.type.shape]  # weights have no symbols
        zeros = torch.zeros(shape, dtype=weight.type.dtype.torch)
        graph.weights[name].weight = Weight(name, weight.type, TensorSource(zeros))
    return graph


def _logits(chosen: Value) -> Value | None:
    """Walk back to the scoring function nearest to the start of the chain."""
    v, scored = chosen, None
    while v.producer is not None and v.producer.op in _BETWEEN | _SAME:
        step = _computed_operand(v.producer)
        if step is None:
            break
        scored = step if v.producer.op in _SCORES else scored
        v = step
    logits = scored if scored is not None else chosen
    while logits.producer is not None and logits.producer.op in _SAME:
        step = logits.producer.operands[0]
        assert step is not None
        logits = step
    return logits if _plausible(logits) else None


def _computed_operand(node: Node) -> Value | None:
    """The float operand that depends on the input; the largest where several do."""
    floats = [v for v in node.operands if v is not None and v.dtype.is_float and v.weight is None]
    computed = [v for v in floats if v.producer is None or v.producer.op not in ("tensor.constant", "tensor.full")]
    return max(computed, key=lambda v: v.type.rank, default=None)


def _plausible(v: Value) -> bool:
    p = v.producer
    if not v.type.rank or not isinstance(v.shape[-1], int):
        return False
    if p is None or p.op in _PRODUCERS:
        return True
    biased = p.op == "math.add" and any(
        o is not None and o.producer and o.producer.op in _PRODUCERS for o in p.operands
    )
    return biased


def pinned(logits: torch.Tensor, pin: str) -> torch.Tensor:
    """Logits [..., E] that depend on the row and the expert only: all tied; tied in groups that change with
    the row; every row's first choice the last expert, the others tied; or row r's first choices the experts
    r, r + 1, … without ties, so that every expert is used as soon as there are as many rows."""
    experts = logits.shape[-1]
    if pin == "ties":
        return torch.zeros_like(logits)
    e = torch.arange(experts)
    if pin == "one expert":
        row = torch.where(e == experts - 1, 4.0, 0.0)
        return row.expand(logits.shape).to(logits.dtype)
    rows = torch.arange(logits.numel() // experts if experts else 0)[:, None]
    if pin == "experts in turn":
        return (-((e - rows) % experts) / experts).to(logits.dtype).reshape(logits.shape)
    return ((rows * 5 + e * 3 + rows * e) % 4).to(logits.dtype).reshape(logits.shape)
