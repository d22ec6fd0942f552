"""Rules and passes that are wrong in one way each, for the tests of `moec.bisect`."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.ir import Builder, DType, Graph
from moec.passes import Analysis, Pass, Rewrite


@dataclass(frozen=True)
class WrongSilu(Rewrite):
    """silu(x) → x · sigmoid(1.001 x), everywhere"""

    def pattern(self, p, x):
        return p.silu(x)

    def replace(self, b, m):
        return b.mul(m.x, b.sigmoid(b.mul(m.x, 1.001)))


@dataclass(frozen=True)
class NoEpsInOneLayer(Rewrite):
    """rsqrt(x + eps) → rsqrt(x), in one layer only"""

    layer: str = "model.layers.3"

    def pattern(self, p, x):
        return p.rsqrt(p.add(x, p.const("eps")))

    def when(self, m):
        if not m.location.under(self.layer):
            return m.no(f"not in {self.layer}")
        return None

    def replace(self, b, m):
        return b.rsqrt(m.x)


@dataclass(frozen=True)
class RightThenWrong(Rewrite):
    """mul(silu(x), y) → swiglu(x, y) in the first layers, swiglu(y, x) under the last"""

    def pattern(self, p, x, y):
        return p.mul(p.silu(x), y)

    def when(self, m):
        return None if m.x.type == m.y.type else m.no("types differ")

    def replace(self, b, m):
        return b.swiglu(m.y, m.x) if m.location.under("model.layers.2") else b.swiglu(m.x, m.y)


@dataclass(frozen=True)
class ShortTable(Rewrite):
    """cos(x) → cos(x up to 9): right as long as no position is larger"""

    def pattern(self, p, x):
        return p.cos(x)

    def when(self, m):
        return m.no("done") if m.x.producer is not None and m.x.producer.op == "math.clamp" else None

    def replace(self, b, m):
        return b.cos(b.clamp(m.x, low=-9.0, high=9.0))


@dataclass(frozen=True)
class Clamped(Rewrite):
    """silu(x) → silu(x clamped to ±50): wrong for inputs that no seed draws"""

    def pattern(self, p, x):
        return p.silu(x)

    def when(self, m):
        return m.no("done") if m.x.producer is not None and m.x.producer.op == "math.clamp" else None

    def replace(self, b, m):
        return b.silu(b.clamp(m.x, low=-50.0, high=50.0))


@dataclass(frozen=True)
class Raises(Rewrite):
    """Its replace() raises, in one layer"""

    def pattern(self, p, x):
        return p.silu(x)

    def when(self, m):
        return None if m.location.under("model.layers.1") else m.no("elsewhere")

    def replace(self, b, m):
        return {}["missing"]


@dataclass(frozen=True)
class WhenRaises(Rewrite):
    """Its when() raises"""

    def pattern(self, p, x):
        return p.silu(x)

    def when(self, m):
        raise ValueError("no idea")

    def replace(self, b, m):
        return b.silu(m.x)


@dataclass(frozen=True)
class WrongDType(Rewrite):
    """replace() returns another dtype"""

    def pattern(self, p, x):
        return p.silu(x)

    def replace(self, b, m):
        return b.cast(m.x, dtype="f64")


@dataclass(frozen=True)
class Overflows(Rewrite):
    """silu(x) → silu(x · 60000 / 60000): the same in real numbers, infinite in f16"""

    def pattern(self, p, x):
        return p.silu(x)

    def when(self, m):
        return m.no("done") if m.x.producer is not None and m.x.producer.op == "math.div" else None

    def replace(self, b, m):
        return b.silu(b.div(b.mul(m.x, 60000.0), 60000.0))


@dataclass(frozen=True)
class OutOfRange(Rewrite):
    """Has the right type, but fails when it runs: an index beyond the axis"""

    def pattern(self, p, x):
        return p.silu(x)

    def replace(self, b, m):
        last = b.const((99,), "i64", (1,))
        row = b.gather(m.x, last, axis=-1)
        return b.add(m.x, row)


@dataclass(frozen=True)
class WrongCodes(Rewrite):
    """A scale of activations times 1.5, in a graph that is quantised already"""

    def pattern(self, p, x):
        return p.quantize(x, block=p.attr("block"))

    def when(self, m):
        return m.no("done") if any(u.op == "math.mul" for u in m.roots[1].users) else None

    def replace(self, b, m):
        codes, scale = b.quantize(m.x, block=m.block)
        return codes, b.mul(scale, 1.5)


@dataclass(frozen=True)
class Forth(Rewrite):
    """With Back, never ends"""

    def pattern(self, p, x):
        return p.tanh(x)

    def replace(self, b, m):
        return b.neg(b.tanh(b.neg(m.x)))


@dataclass(frozen=True)
class Back(Rewrite):
    """tanh(x) → −tanh(−x) → tanh(x) → …"""

    def pattern(self, p, x):
        return p.neg(p.tanh(p.neg(x)))

    def replace(self, b, m):
        return b.tanh(m.x)


@dataclass(frozen=True)
class Invalid(Pass):
    """Leaves a result type that its op does not give."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for node in graph.find("math.silu"):
            node.result.type = node.result.type.with_dtype(DType.BF16)
        return graph


@dataclass(frozen=True)
class Mutates(Pass):
    """Changes the graph that it was given."""

    def run(self, graph: Graph) -> Graph:
        for node in graph.find("math.silu"):
            b = Builder(graph, before=node, location=node.location)
            graph.replace_value(node.result, b.mul(node.operands[0], b.sigmoid(node.operands[0])))
            graph.erase(node)
        return graph


@dataclass(frozen=True)
class Counts(Analysis):
    """Cannot count a silu."""

    def run(self, graph: Graph) -> int:
        return len(graph) // (1 - min(1, len(graph.find("math.silu"))))


@dataclass(frozen=True)
class DropsOutput(Pass):
    """Returns a graph with fewer outputs; its options have no hash."""

    names: list = field(default_factory=list)

    def run(self, graph: Graph) -> Graph:
        smaller = Graph()
        x = smaller.add_input("x", graph.inputs[0].type)
        smaller.add_output(x, graph.output_names[0])
        return smaller


@dataclass(frozen=True)
class ForgetsReturn(Pass):
    """run() returns nothing."""

    def run(self, graph: Graph) -> Graph:  # type: ignore[empty-body]  # the mistake to be found
        graph.clone()


@dataclass(frozen=True)
class WrongScale(Pass):
    """Quantises the first linear layer to FP8 and forgets half of the scale."""

    def run(self, graph: Graph) -> Graph:
        graph = graph.clone()
        for node in graph.find("math.silu"):
            b = Builder(graph, before=node._next, location=node.location)
            codes, scale = b.quantize(node.result, block=(1, 128))
            wrong = b.dequantize(codes, b.mul(scale, 3.0), block=(1, 128), dtype="f32")
            for user, i in list(node.result.uses):
                if user not in b.created:
                    graph.replace_operand(user, i, wrong)
        return graph
