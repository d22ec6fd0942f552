"""What to run a graph on: sizes for its dims, inputs that fit their roles, data for weights that have none."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moec.ir.arrays import converted
from moec.ir.dims import Dim, evaluate
from moec.ir.errors import CompileError
from moec.ir.graph import Graph, Node, Value
from moec.ir.runtime_sizes import symbols_of
from moec.ir.types import DType
from moec.ir.weight import TensorSource, Weight

# ops that hand integers on: operand 0 of the node holds what its results hold
_MOVES = {
    "tensor.reshape", "tensor.transpose", "tensor.expand", "tensor.slice", "tensor.concat", "tensor.split",
    "tensor.gather", "tensor.gather_elements", "tensor.pad", "math.cast", "math.clamp", "math.sort", "math.topk",
    "math.max", "math.min",
}  # fmt: skip
_COMPARES = {"math.eq", "math.ne", "math.lt", "math.le", "math.gt", "math.ge"}
_FREE = 8  # integers that index nothing are drawn below this


@dataclass(frozen=True)
class Case:
    """One run: a size for every dim symbol, the inputs in the graph's own dtypes, and `pin`: what to put in
    the place of the routers' logits ("ties", "one expert", "some ties"), or None."""

    label: str
    binding: Mapping[str, int]
    inputs: tuple[torch.Tensor, ...] = field(repr=False)
    pin: str | None = None


def candidate_bindings(symbols: Sequence[str]) -> Iterator[dict[str, int]]:
    """Sizes to try, best first: all 1; odd and distinct; larger and distinct; each symbol 0 in turn; then
    others, for graphs whose dims forbid some of these."""
    names = sorted(symbols)
    odd = [3, 5, 7, 9, 11, 13, 15, 17]
    larger = [11, 13, 10, 16, 12, 19, 14, 17]
    yield dict.fromkeys(names, 1)
    yield {n: odd[i % 8] for i, n in enumerate(names)}
    yield {n: larger[i % 8] for i, n in enumerate(names)}
    for zero in names:
        yield {n: 0 if n == zero else odd[(i + 1) % 8] for i, n in enumerate(names)}
    for k in range(2, 14):
        yield {n: k + (i if k % 2 else 0) for i, n in enumerate(names)}
    for k in (16, 32, 64):
        yield dict.fromkeys(names, k)


def fits(graph: Graph, binding: Mapping[str, int]) -> bool:
    """Whether every size in the graph is a size, every slice lies within its operand, and what is written fits."""
    for v in (*graph.inputs, *(r for n in graph.nodes for r in n.results)):
        if any(evaluate(s, binding) < 0 for s in v.shape if symbols_of(s) <= binding.keys()):
            return False
    for node in graph.nodes:
        x = node.operands[0] if node.operands else None
        if node.op == "tensor.slice" and x is not None:
            sizes = x.shape[node.attrs["axis"]], node.attrs["start"], node.attrs["end"]
            if not symbols_of(sizes) <= binding.keys():
                continue  # known at run time only
            extent, start, end = (evaluate(s, binding) for s in sizes)
            if not 0 <= start <= end <= extent:
                return False
        if node.op == "tensor.write" and x is not None:
            room = _places(node)
            if symbols_of(room) <= binding.keys() and evaluate(room, binding) < 1:
                return False
    return True


def _places(node: Node) -> int | Dim:
    """How many places `tensor.write` may write its rows at."""
    x, rows, _ = node.operands
    assert x is not None
    assert rows is not None
    axis = node.attrs["axis"]
    return x.shape[axis] - rows.shape[axis] + 1


# -- weights --------------------------------------------------------------------------------------


def with_data(graph: Graph, seed: int = 0) -> Graph:
    """The graph, or a copy in which weights without data have seeded random data. It depends on name and
    type of the weight only, so that graphs which share a weight share its data: normal numbers divided by
    √(last axis) for matrices, 1 + a tenth of that for vectors, positive scales; integers in the range that
    their uses allow."""
    if all(v.weight is not None and v.weight.source for g in _graphs(graph) for v in g.weights.values()):
        return graph
    graph = graph.clone()
    for g in _graphs(graph):
        for name, v in g.weights.items():
            assert v.weight is not None
            if v.weight.source is None:
                v.weight = Weight(name, v.type, TensorSource(_random_weight(v, seed)))
    return graph


def _graphs(graph: Graph) -> list[Graph]:
    return [graph, *graph.functions.values()]


def _random_weight(v: Value, seed: int) -> torch.Tensor:
    assert v.weight is not None
    shape = tuple(evaluate(s, {}) for s in v.shape)
    r = torch.Generator().manual_seed(zlib.crc32(f"{seed} {v.weight.name} {v.type}".encode()))
    rows = _offset_rows(v) if v.dtype.is_integer else None
    if rows is not None and not symbols_of(rows):
        return _ends(shape, evaluate(rows, {}), r).to(v.dtype.torch)
    if v.dtype.is_integer:
        replicas = [
            n.operand("table").shape[1] for _, n, role in _reached(v) if n.op == "moe.remap" and role == "count"
        ]
        low, high = (1, replicas[0] + 1) if replicas else (0, index_bound(v, {}) or _FREE)
        if _is_codes(v):
            low, high = 1 - 2 ** (v.dtype.bits - 1), 2 ** (v.dtype.bits - 1)
        return converted(torch.randint(low, high, shape, generator=r), v.dtype)
    if v.dtype is DType.BOOL:
        return torch.rand(shape, generator=r) < 0.5
    if v.dtype.is_float:
        x = torch.randn(shape, generator=r)
        if "scale" in v.weight.name:
            x = x.abs() * 0.1 + 0.01
        elif v.dtype.bits > 8:
            x = 1 + 0.1 * x if len(shape) < 2 else x / max(1, shape[-1]) ** 0.5
        return x.to(v.dtype.torch)
    raise CompileError(f"no random data for weight {v.weight.name!r} of {v.type}", code="weight")


# -- inputs ---------------------------------------------------------------------------------------


def make_inputs(
    graph: Graph,
    binding: Mapping[str, int],
    seed: int = 0,
    *,
    positive: bool = False,
    wide: bool = False,
    large: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Seeded inputs. Floats are normal (`positive`: |x| + 0.1; `wide`: of all magnitudes from 0.01 to 30, which
    meet clamps on both sides; `large`: from 1 to 10⁴), float masks 0 or −10⁴. Integers that index
    something stay below its size, and name nothing twice in a row where they choose experts or places to
    write; offsets of groups ascend to the number of rows; positions count up
    and start again; masks are 0 or 1. Of masks the first and last columns are alive, so every row sees something."""
    r = torch.Generator().manual_seed(zlib.crc32(f"{seed} {sorted(binding.items())}".encode()))
    inputs = tuple(_input(v, binding, r) for v in graph.inputs)
    for v, t in zip(graph.inputs, inputs, strict=True):
        if v.dtype.is_float and not _masks(v):
            if wide or large:
                low, high = (0.0, 4.0) if large else (-2.0, 1.5)
                exponent = torch.linspace(low, high, t.numel())[torch.randperm(t.numel(), generator=r)]
                t.copy_(t.to(torch.float32).sign() * 10 ** exponent.reshape(t.shape))
            elif positive:
                t.copy_(t.to(torch.float32).abs() + 0.1)
    return inputs


def _masks(v: Value) -> bool:
    return "mask" in (v.name or "").lower() or _is_mask(v)


def _input(v: Value, binding: Mapping[str, int], r: torch.Generator) -> torch.Tensor:
    shape = tuple(evaluate(s, binding) for s in v.shape)
    name = (v.name or "").lower()
    rows = _offset_rows(v) if v.dtype.is_integer else None
    if rows is not None:
        return _ends(shape, evaluate(rows, binding), r).to(v.dtype.torch)
    if v.dtype is DType.BOOL or _masks(v):
        alive = _alive(torch.rand(shape, generator=r) < 0.6)
        if v.dtype.is_float:
            return torch.where(alive, 0.0, -1e4).to(v.dtype.torch)
        return alive.to(v.dtype.torch)
    if v.dtype.is_float:
        return torch.randn(shape, generator=r).to(v.dtype.torch)
    if not v.dtype.is_integer:
        raise CompileError(f"no random data for input {v.name!r} of {v.type}", code="arguments")
    bound = index_bound(v, binding)
    if "pos" in name and shape:
        # every row starts somewhere and starts again, so that a rule cannot take positions for 0, 1, 2, …
        each = (*shape[:-1], 1)
        period = shape[-1] // 2 + 1 + torch.randint(0, 3, each, generator=r)
        counted = (torch.arange(shape[-1]) + torch.randint(0, 3, each, generator=r)) % period
        return (counted if bound is None else counted % max(1, bound)).to(v.dtype.torch)
    if shape and bound is not None and shape[-1] <= bound and _distinct(v):
        ranks = torch.rand((*shape[:-1], bound), generator=r).argsort(-1)
        return ranks[..., : shape[-1]].to(v.dtype.torch)
    low, high = (-_FREE, _FREE) if _is_codes(v) else (0, _FREE if bound is None else max(1, bound))
    return converted(torch.randint(low, high, shape, generator=r), v.dtype)


def _ends(shape: tuple[int, ...], total: int, r: torch.Generator) -> torch.Tensor:
    """Ascending ends of groups, the last at `total`."""
    ends = torch.randint(0, total + 1, shape, generator=r).sort().values
    ends[-1:] = total
    return ends


def _distinct(v: Value) -> bool:
    """Whether rows of an index name nothing twice: chosen experts, and what is written where the order of two writes
    is not promised."""
    for _, node, role in _reached(v):
        if node.op == "tensor.scatter_elements" and role == "index" and node.attrs["reduce"] == "none":
            return True
        if node.op == "tensor.index_put" and role == "index" and not node.attrs["accumulate"]:
            return True
        if role == "experts":
            return True
    return False


def _alive(mask: torch.Tensor) -> torch.Tensor:
    if mask.dim():
        mask[..., :1] = True
        mask[..., -1:] = True
    return mask


def _reached(v: Value) -> Iterator[tuple[Value, Node, str]]:
    """Uses (held value, node, operand name) of an integer value and of what holds its elements."""
    stack, seen = [v], {v}
    while stack:
        held = stack.pop()
        for node, i in held.uses:
            named = node.opdef.named_operands(node.operands)
            flat = [n for n, o in named.items() for _ in (o if isinstance(o, tuple) else (o,))]
            yield held, node, flat[i]
            if node.op == "call.graph" and node.graph is not None:
                callee = node.graph.functions.get(node.attrs["callee"])
                following = [callee.inputs[i]] if callee else []
            elif node.op in _MOVES and (i == 0 or node.op in ("tensor.concat", "math.max", "math.min")):
                following = [r for r in node.results if r.dtype == held.dtype or r.dtype.is_integer][:1]
                following = list(node.results) if node.op == "tensor.split" else following
            elif (node.op == "math.where" and i > 0) or (node.op == "moe.remap" and flat[i] == "table"):
                following = [node.result]
            else:
                following = []
            for f in following:
                if f not in seen:
                    seen.add(f)
                    stack.append(f)


def _is_codes(v: Value) -> bool:
    """Whether an integer is codes of stored weights."""
    return any(
        n.opdef.family == "quant" and held is v and role in ("codes", "gate_up", "down")
        for held, n, role in _reached(v)
    )


def index_bound(v: Value, binding: Mapping[str, int]) -> int | None:
    """The smallest size that elements of the integer value `v` index, or None where they index nothing."""
    return min((evaluate(s, binding) for s in _indexed(v) if symbols_of(s) <= binding.keys()), default=None)


def _indexed(v: Value) -> list[int | Dim]:
    """The sizes that elements of `v` index."""
    sizes: list[int | Dim] = []
    for _, node, role in _reached(v):
        x = node.operands[0]
        if role == "index" and node.op in ("tensor.gather", "tensor.gather_elements", "tensor.scatter_elements"):
            assert x is not None
            sizes.append(x.shape[node.attrs["axis"]])
        elif role == "index" and node.op == "tensor.index_put":
            assert x is not None
            sizes.append(x.shape[0])
        elif role == "at" and node.op == "tensor.write":
            sizes.append(_places(node))
        elif node.op == "tensor.one_hot":
            sizes.append(node.attrs["depth"])
        elif role == "experts" and node.op in ("moe.experts", "quant.scaled_experts"):
            sizes.append(node.operand("gate_up").shape[0])
        elif role == "experts" and node.op == "moe.remap":
            sizes.append(node.operand("table").shape[0])
        elif node.op == "tensor.histc":
            sizes.append(node.attrs["bins"])
    return sizes


def _offset_rows(v: Value) -> int | Dim | None:
    """The number of rows that the offsets of a grouped product end at, where `v` is such offsets."""
    for held, node, role in _reached(v):
        if node.op == "linear.grouped_matmul" and role == "offsets" and held is v:
            x = node.operands[0]
            return None if x is None else x.shape[0]
    return None


def _is_mask(v: Value) -> bool:
    """An integer that becomes a bool or is compared with 0 or 1, and indexes nothing."""
    if not v.dtype.is_integer:
        return any(n.op == "attention.sdpa" and role == "mask" for _, n, role in _reached(v))
    used = False
    for _, node, _role in _reached(v):
        if node.op == "math.cast" and node.result.dtype is DType.BOOL:
            used = True
        elif node.op in _COMPARES:
            other = [o.producer for o in node.operands if o is not None and o.producer is not None]
            used = used or any(p.op == "tensor.constant" and set(p.attrs["value"]) <= {0, 1} for p in other)
    return used and not _indexed(v)
