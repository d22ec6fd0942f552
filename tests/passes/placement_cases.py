"""Loads and small MoE graphs for the placement and quantisation tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from moec.ir import Builder, Dim, DType, Graph, Location, Mesh, TensorType, Value, Weight


def zipf(exponent: float, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """Expert loads falling as rank^-exponent, shuffled per layer."""
    r = np.random.default_rng(seed)
    return np.stack([r.permutation(np.arange(1, experts + 1) ** -exponent) for _ in range(layers)])


def lognormal(sigma: float, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0.0, sigma, (layers, experts))


def gpu_loads(load: np.ndarray, row: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Load per GPU, worked out slot by slot (independent of the code under test)."""
    counts = {e: row.tolist().count(e) for e in set(row.tolist())}
    result, slot = [], 0
    for n in mesh.slots:
        result.append(sum(load[e] / counts[e] for e in row[slot : slot + n].tolist()))
        slot += n
    return np.array(result)


def balance(load: np.ndarray, row: np.ndarray, mesh: Mesh) -> float:
    loads = gpu_loads(load, row, mesh)[np.array(mesh.slots) > 0]
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0


def every_placement(num_experts: int, mesh: Mesh) -> Iterator[np.ndarray]:
    """All contents of the slots that hold every expert (order within a GPU does not matter)."""
    per_gpu = [list(itertools.combinations_with_replacement(range(num_experts), n)) for n in mesh.slots]
    for contents in itertools.product(*per_gpu):
        row = [e for gpu in contents for e in gpu]
        if set(row) == set(range(num_experts)):
            yield np.array(row)


def moe_graph(
    layers: int = 2,
    experts: int = 6,
    d: int = 16,
    f: int = 8,
    k: int = 2,
    dtype: str = "f32",
    biases: bool = False,
    seed: int = 0,
    exact: bool = False,
    **attrs: object,
) -> Graph:
    """x [T, d] through `layers` × (linear → router → experts → add), modules "layers.i.{proj,gate,experts}", then a
    linear in module "lm_head". `exact`: weights are −1, 0 and 1 and every layer reads x itself, so that with
    relu and small whole inputs the experts' sums are exact in any order."""
    g = Graph()
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str, *shape: int) -> Value:
        data = torch.randn(shape, generator=generator)
        data = data.round().clamp(-1, 1) if exact else data * 0.3
        return g.add_weight(Weight.of(name, data.to(DType.of(dtype).torch)))

    source = x = g.add_input("x", TensorType(DType.of(dtype), (Dim("T"), d)))
    for i in range(layers):
        path = f"layers.{i}"
        h = builder(g, f"{path}.proj").linear(source if exact else x, weight(f"{path}.proj.weight", d, d))
        logits = builder(g, f"{path}.gate").linear(h, weight(f"{path}.gate.weight", experts, d))
        b = builder(g, f"{path}.experts")
        routed = b.route(logits, k=k)
        operands = [h, *routed, weight(f"{path}.gate_up", experts, 2 * f, d), weight(f"{path}.down", experts, d, f)]
        if biases:
            operands += [weight(f"{path}.gate_up_bias", experts, 2 * f), weight(f"{path}.down_bias", experts, d)]
        x = b.add(x, b.op("moe.experts", operands, dict(attrs)))
    g.add_output(builder(g, "lm_head").linear(x, weight("lm_head.weight", 32, d)), "logits")
    g.verify()
    return g


def builder(g: Graph, module: str) -> Builder:
    return Builder(g, location=Location.at(module))
