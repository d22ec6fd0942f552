"""One form for each meaning: no-op removal, axes, broadcasts, linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import Builder, CompileError, DType, Graph, Node, TensorType, Value
from moec.passes.base import Pass
from moec.passes.clean.cleanup import DeadCode
from moec.passes.clean.simplify_math import MATH_RULES
from moec.passes.rewrite import Match, Refused, Rewrite, RuleSet
from moec.passes.rewriting.matcher import scalar_constant

# ops whose `axis`/`axes` count from the end, so that patterns can say "the last axis" for any rank
_FROM_END = {
    "math.sum", "math.prod", "math.mean", "math.amax", "math.amin", "math.all", "math.any", "math.softmax",
    "math.log_softmax", "math.cumsum", "math.argmax", "math.sort", "math.topk", "tensor.concat", "tensor.split",
    "tensor.slice",
    "tensor.gather_elements", "tensor.scatter_elements",
}  # fmt: skip


@dataclass(frozen=True)
class NormaliseAxes(Pass):
    """Axes count from the end; a gather's from the front; reductions list them in order."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for g in (graph, *graph.functions.values()):
            for node in g.nodes:
                x = node.operands[0] if node.operands else None
                if x is None or not x.type.rank:
                    continue
                rank = x.type.rank
                if node.op in _FROM_END and "axis" in node.attrs:
                    node.attrs["axis"] = node.attrs["axis"] % rank - rank
                elif node.op in _FROM_END:
                    node.attrs["axes"] = tuple(sorted(a % rank - rank for a in node.attrs["axes"]))
                elif node.op == "tensor.gather":
                    node.attrs["axis"] %= rank
        return graph


@dataclass(frozen=True)
class DropBroadcasts(Pass):
    """Elementwise ops broadcast by themselves: the operand of an `expand`, or the number of a `full`, takes its
    place where the op's type rule gives the same result for it."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for g in (graph, *graph.functions.values()):
            for node in g.nodes:
                if node.opdef.elementwise and len(node.operands) > 1:
                    for i in range(len(node.operands)):
                        self._drop(g, node, i)
        return graph

    @staticmethod
    def _drop(graph: Graph, node: Node, i: int) -> None:
        value = node.operands[i]
        source = value.producer if value is not None else None
        if source is None or source.op not in ("tensor.expand", "tensor.full"):
            return
        if source.op == "tensor.expand":
            smaller = source.operands[0]
            assert smaller is not None
            if _gives_the_same(node, i, smaller.type):
                graph.replace_operand(node, i, smaller)
        elif _gives_the_same(node, i, TensorType(source.attrs["dtype"], ())):
            b = Builder(graph, before=node, location=source.location)
            graph.replace_operand(node, i, b.const(source.attrs["value"], source.attrs["dtype"]))


def _gives_the_same(node: Node, i: int, type: TensorType) -> bool:
    """Whether the results keep their types with another type of operand i."""
    types = [type if k == i else None if v is None else v.type for k, v in enumerate(node.operands)]
    try:
        results = node.opdef.instance(types, node.attrs).infer()
    except CompileError:  # it takes equal shapes only
        return False
    return (results if isinstance(results, tuple) else (results,)) == tuple(r.type for r in node.results)


@dataclass(frozen=True)
class CastToSame(Rewrite):
    """cast(x) to the dtype of x → x"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.cast(x, dtype=p.attr("dtype"))

    def when(self, m: Match) -> Refused | None:
        return m.no(f"{m.x.dtype} becomes {m.dtype}") if m.x.dtype != m.dtype else None

    def replace(self, b: Any, m: Match) -> Any:
        return m.x


# what holds every value of a dtype; any number type tells 0 from 1
_HOLDS = {
    DType.BF16: (DType.F32, DType.F64),
    DType.F16: (DType.F32, DType.F64),
    DType.F32: (DType.F64,),
    DType.I32: (DType.I64, DType.F64),
    DType.I16: (DType.I32, DType.I64, DType.F32, DType.F64),
    DType.I8: (DType.I16, DType.I32, DType.I64, DType.BF16, DType.F16, DType.F32, DType.F64),
    DType.U8: (DType.I16, DType.I32, DType.I64, DType.BF16, DType.F16, DType.F32, DType.F64),
    DType.BOOL: (
        DType.U8, DType.I8, DType.I16, DType.I32, DType.I64, DType.BF16, DType.F16, DType.F32, DType.F64,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CastOfCast(Rewrite):
    """cast(cast(x, wider), dtype) → cast(x, dtype), or x where that is its own dtype"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.cast(p.shared(p.cast(x, dtype=p.attr("wide"))), dtype=p.attr("dtype"))

    def when(self, m: Match) -> Refused | None:
        if m.wide not in _HOLDS.get(m.x.dtype, ()):
            return m.no(f"{m.wide} does not hold every {m.x.dtype} that becomes {m.dtype}")
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return m.x if m.dtype == m.x.dtype else b.cast(m.x, dtype=m.dtype)


@dataclass(frozen=True)
class CastOfReshape(Rewrite):
    """cast(reshape(x)) → reshape(cast(x)), so that a cast stands next to what it rounds"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.cast(p.reshape(x, shape=p.attr("shape")), dtype=p.attr("dtype"))

    def replace(self, b: Any, m: Match) -> Any:
        return b.reshape(b.cast(m.x, dtype=m.dtype), shape=m.shape)


@dataclass(frozen=True)
class ReshapeOfReshape(Rewrite):
    """reshape(reshape(x)) → reshape(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        # a reshape costs nothing, so the inner one may stay for others
        return p.reshape(p.shared(p.reshape(x, shape=p.attr())), shape=p.attr("shape"))

    def replace(self, b: Any, m: Match) -> Any:
        return b.reshape(m.x, shape=m.shape)


@dataclass(frozen=True)
class NoOpShape(Rewrite):
    """A reshape, expand, slice, transpose, split or concat that returns its operand → the operand"""

    op: str = "tensor.reshape"

    @property
    def name(self) -> str:
        return f"no_op_{self.op.split('.')[1]}"

    def pattern(self, p: Any, x: Any) -> Any:
        attrs = {
            "tensor.reshape": ["shape"],
            "tensor.expand": ["shape"],
            "tensor.slice": ["axis", "start", "end", "step"],
            "tensor.transpose": ["perm"],
            "tensor.concat": ["axis"],
            "tensor.split": ["axis", "sizes"],
        }[self.op]
        return p.op(self.op, [x], {a: p.attr(a) for a in attrs})

    def when(self, m: Match) -> Refused | None:
        if m.x.type != m.root.type or (self.op == "tensor.transpose" and m.perm != tuple(range(m.x.type.rank))):
            return m.no("it changes the shape")
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class GatherBehindOne(Rewrite):
    """gather(x [1, T, …], i, axis=1) → gather(x [T, …], i), reshaped"""

    def pattern(self, p: Any, x: Any, i: Any) -> Any:
        return p.gather(p.typed(x, shape=(1, ...)), i, axis=1)

    def replace(self, b: Any, m: Match) -> Any:
        return b.reshape(b.gather(b.reshape(m.x, shape=m.x.shape[1:]), m.i, axis=0), shape=m.root.shape)


@dataclass(frozen=True)
class SliceOfConcat(Rewrite):
    """slice(concat(…)) that is exactly some of the parts → those parts"""

    def pattern(self, p: Any) -> Any:
        both = p.shared(p.concat(p.rest("parts"), axis=p.attr("axis")))
        return p.slice(both, axis=p.attr("axis"), start=p.attr("start"), end=p.attr("end"))

    def when(self, m: Match) -> Refused | None:
        return None if self._parts(m) else m.no("it cuts through a part")

    @staticmethod
    def _parts(m: Match) -> tuple[Value, ...]:
        edges: list[Any] = [0]
        for part in m.parts:
            edges.append(edges[-1] + part.shape[m.axis])
        if m.start not in edges or m.end not in edges:
            return ()
        return tuple(m.parts[edges.index(m.start) : edges.index(m.end)])

    def replace(self, b: Any, m: Match) -> Any:
        parts = self._parts(m)
        return parts[0] if len(parts) == 1 else b.concat(*parts, axis=m.axis)


@dataclass(frozen=True)
class TransposeOfTranspose(Rewrite):
    """transpose(transpose(x, p), q) → transpose(x, p∘q)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.transpose(p.shared(p.transpose(x, perm=p.attr("inner"))), perm=p.attr("outer"))

    def replace(self, b: Any, m: Match) -> Any:
        perm = tuple(m.inner[i] for i in m.outer)
        return m.x if perm == tuple(range(len(perm))) else b.transpose(m.x, perm=perm)


@dataclass(frozen=True)
class Square(Rewrite):
    """pow(x, 2) → mul(x, x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.pow(x, 2.0)

    def replace(self, b: Any, m: Match) -> Any:
        return b.mul(m.x, m.x)


@dataclass(frozen=True)
class PowRsqrt(Rewrite):
    """pow(x, -1/2) → rsqrt(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.pow(x, -0.5)

    def replace(self, b: Any, m: Match) -> Any:
        return b.rsqrt(m.x)


@dataclass(frozen=True)
class ReciprocalSqrt(Rewrite):
    """reciprocal(sqrt(x)) → rsqrt(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.reciprocal(p.sqrt(x))

    def replace(self, b: Any, m: Match) -> Any:
        return b.rsqrt(m.x)


@dataclass(frozen=True)
class DivideBySqrt(Rewrite):
    """x / sqrt(y) → x · rsqrt(y) (1 / sqrt(y) → rsqrt(y))"""

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.div(x, p.sqrt(y))

    def replace(self, b: Any, m: Match) -> Any:
        inverse = b.rsqrt(m.y)
        return inverse if scalar_constant(m.x) == 1 and inverse.type == m.root.type else b.mul(m.x, inverse)


@dataclass(frozen=True)
class NeutralElement(Rewrite):
    """x + 0, x − 0, x · 1, x / 1 → x"""

    op: str = "math.mul"
    value: float = 1.0

    @property
    def name(self) -> str:
        return f"neutral_{self.op.split('.')[1]}"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.op(self.op, [x, p.approx(self.value, 0.0)])

    def when(self, m: Match) -> Refused | None:
        return m.no("it broadcasts") if m.x.type != m.root.type else None

    def replace(self, b: Any, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class AndTrue(Rewrite):
    """x and true → x"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.and_(x, True)

    def when(self, m: Match) -> Refused | None:
        return m.no("it broadcasts") if m.x.type != m.root.type else None

    def replace(self, b: Any, m: Match) -> Any:
        return m.x


@dataclass(frozen=True)
class Silu(Rewrite):
    """x · sigmoid(x) → silu(x)"""

    def pattern(self, p: Any, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def replace(self, b: Any, m: Match) -> Any:
        return b.silu(m.x)


@dataclass(frozen=True)
class MatMulToLinear(Rewrite):
    """matmul(x, transpose(w)) with a 2-D w → linear(x, w)"""

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, p.transpose(w, perm=(1, 0)))

    def replace(self, b: Any, m: Match) -> Any:
        return b.linear_linear(m.x, m.w)


@dataclass(frozen=True)
class StoredMatMul(Rewrite):
    """matmul(x, w) with a stored 2-D w → linear(x, wᵀ), the transpose being a view of the stored weight"""

    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, w)

    def when(self, m: Match) -> Refused | None:
        if m.w.weight is None or m.w.type.rank != 2:
            return m.no(f"{m.w.type} is no stored matrix", at=m.w)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        weight = m.w.weight
        shape = weight.type.shape[::-1]
        w = b.weight(f"{weight.name}.transposed", lambda: weight.load().t(), weight.type.with_shape(shape))
        return b.linear_linear(m.x, w)


@dataclass(frozen=True)
class LinearBias(Rewrite):
    """linear(x, w, b) + bias → linear(x, w, b + bias), or linear(x, w, bias) without b"""

    def pattern(self, p: Any, x: Any, w: Any, bias: Any) -> Any:
        return p.add(p.linear_linear(x, w, p.optional("first")), bias)

    def when(self, m: Match) -> Refused | None:
        if m.bias.shape != m.w.shape[:1] or not is_parameter(m.bias):
            return m.no(f"{m.bias.type} is no bias", at=m.bias)
        return None

    def replace(self, b: Any, m: Match) -> Any:
        return b.linear_linear(m.x, m.w, m.bias if m.first is None else b.add(m.first, m.bias))


def is_parameter(v: Value) -> bool:
    """A weight or constant, maybe reshaped or cast."""
    while v.producer is not None and v.producer.op in ("math.cast", "tensor.reshape", "tensor.transpose"):
        (inner,) = v.producer.operands
        assert inner is not None
        v = inner
    return v.weight is not None or (v.producer is not None and v.producer.op == "tensor.constant")


RULES: tuple[Rewrite, ...] = (
    CastToSame(),
    CastOfCast(),
    CastOfReshape(),
    ReshapeOfReshape(),
    *(NoOpShape(f"tensor.{op}") for op in ("reshape", "expand", "slice", "transpose", "concat", "split")),
    GatherBehindOne(),
    SliceOfConcat(),
    TransposeOfTranspose(),
    Square(),
    PowRsqrt(),
    ReciprocalSqrt(),
    DivideBySqrt(),
    NeutralElement("math.mul", 1.0),
    NeutralElement("math.div", 1.0),
    NeutralElement("math.add", 0.0),
    NeutralElement("math.sub", 0.0),
    AndTrue(),
    Silu(),
    MatMulToLinear(),
    StoredMatMul(),
    LinearBias(),
    *MATH_RULES,
)


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Axes from the end, no redundant broadcasts, the rules of this file until none fires, and nothing unused: a dead
    use would keep later rules from matching."""

    def run(self, graph: Graph) -> Graph:
        # broadcasts go first, since rules look for the scalars under them, and again where rules uncovered more
        graph = DropBroadcasts().run(NormaliseAxes().run(graph))
        graph = RuleSet(RULES, quiet=True).run(graph)
        return DeadCode().run(DropBroadcasts().run(graph))
