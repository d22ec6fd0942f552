"""Graphs of what a function builds, and a small MoE layer to build them with."""

import torch

from moec.ir import Builder, Dim, Graph, TensorType, Weight

T, S, B = Dim("T"), Dim("S"), Dim("B")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def graph_of(body, *, dtype="f32", shape=(T, 8), weights=None, name="y"):
    graph = Graph()
    x = graph.add_input("x", TensorType(dtype, shape))
    values = [graph.add_weight(Weight.of(n, w)) for n, w in (weights or {}).items()]
    out = body(Builder(graph), x, *values)
    for i, v in enumerate(out if isinstance(out, tuple) else (out,)):
        graph.add_output(v, name if not i else f"{name}{i}")
    graph.verify()
    return graph


def moe(b, x, router, gate_up, down, *, k=2):
    weights, experts = b.route(b.linear_linear(x, router), k=k)
    return b.op("moe.experts", [x, weights, experts, gate_up, down])


MOE = {"router": seeded(6, 8), "gate_up": seeded(6, 10, 8, seed=1), "down": seeded(6, 8, 5, seed=2)}
