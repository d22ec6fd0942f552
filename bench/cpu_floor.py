"""The least time that a forward pass needs on this machine: for each product the larger of its bytes over the measured
bandwidth and its FLOPs over the measured sgemm peak, added up over the products of the compiled graph.

Weights count once, of experts only those that the row's tokens go to; causal attention counts the pairs that it keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Product:
    bytes: int
    flops: int


@dataclass(frozen=True)
class Machine:
    """Bytes and FLOPs per second."""

    bandwidth: float
    peak: float

    @staticmethod
    def measured(size: int) -> Machine:
        """`size`: bytes that are read at a time, as caches make bandwidth depend on it. The best of several ways."""
        rows = max(size // (4 * 4096), 2)
        matrix, vector = torch.randn(rows, 4096), torch.randn(4096)
        read = min(_best(lambda: torch.mv(matrix, vector)), _best(lambda: matrix.sum()))
        n = 2048
        a, b = torch.randn(n, n), torch.randn(n, n)
        return Machine(matrix.numel() * 4 / read, 2 * n**3 / _best(lambda: torch.mm(a, b), 7))

    def floor(self, products: list[Product]) -> float:
        """Seconds."""
        return sum(max(p.bytes / self.bandwidth, p.flops / self.peak) for p in products)


def _best(run: Callable[[], Any], times: int = 25) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found[2:])


def products(compiled: Any, x: torch.Tensor) -> list[Product]:
    """Of a compiled model's graph on ids i64[B, S]."""
    program = compiled.program
    (batch, length) = x.shape
    sizes = {"B": batch, "S": length}
    routes = [n for n in program.legal.nodes if n.op == "moe.experts"]
    chosen = program.executable.tap([x], [n.operand("experts") for n in routes])
    found = []
    for node in program.legal.nodes:
        if node.op == "linear.linear":
            rows = math.prod(_size(s, sizes) for s in node.operand("x").shape[:-1])
            found.append(_linear(rows, *node.operand("weight").shape))
        elif node.op == "linear.matmul" and node.operands[1].weight is not None:
            rows = math.prod(_size(s, sizes) for s in node.operands[0].shape[:-1])
            found.append(_linear(rows, *node.operands[1].shape[-2:]))
        elif node.op == "moe.experts":
            width, hidden = node.operand("down").shape[1:]
            counts = torch.bincount(chosen[node.operand("experts")].flatten())
            for count in counts[counts > 0].tolist():
                found += [_linear(count, 2 * hidden, width), _linear(count, width, hidden)]
        elif node.op == "attention.sdpa":
            q, k, v = ([_size(s, sizes) for s in o.shape] for o in node.operands[:3])
            pairs = q[2] * k[2] - q[2] * (q[2] - 1) // 2 if node.attrs["causal"] else q[2] * k[2]
            found.append(Product(4 * (math.prod(k) + math.prod(v)), 2 * q[0] * q[1] * pairs * (q[3] + v[3])))
    return found


def _linear(rows: int, n: int, k: int) -> Product:
    return Product(4 * n * k, 2 * rows * n * k)


def _size(size: Any, sizes: dict[str, int]) -> int:
    return size if isinstance(size, int) else size.evaluate(sizes)
