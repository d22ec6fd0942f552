"""Rules and graphs of two inputs, made from functions."""

from dataclasses import dataclass

from moec.ir import Builder, Dim, Graph, TensorType
from moec.passes.rewrite import Rewrite

B = Dim("B")
TYPE = TensorType("f32", (B, 4))


def rule(pattern, replace, when=lambda self, m: None, **options):
    """A rule of these methods, called "rule"."""
    cls = type("Rule", (Rewrite,), {"pattern": pattern, "replace": replace, "when": when})
    return dataclass(frozen=True)(cls)(**options)


def graph_of(body, inputs=("x", "y")):
    """The graph of `body(b, x, y)` on f32[B, 4]; a tuple gives several outputs."""
    graph = Graph()
    values = [graph.add_input(n, TYPE) for n in inputs]
    out = body(Builder(graph), *values)
    for v in out if isinstance(out, tuple) else (out,):
        graph.add_output(v)
    return graph


def ops(graph):
    return [n.op for n in graph.nodes]
