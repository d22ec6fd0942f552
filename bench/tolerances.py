"""How far honest backends are from float64, against the tolerances, and how small an error is still seen.

Per op and dtype, over sizes and distributions of the operands:

- `max`, `rms`: the largest errors of the reference and of ONNX Runtime, each against float64, and of ONNX Runtime
  against the reference (the last is what is judged), in units of the tolerance on the largest and on the typical error;
- `seen`: the relative error that is seen in every case of at least 64 elements, when a whole result has it.

    python bench/tolerances.py [ops or families …]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moec.backends import get_backend
from moec.difference import difference
from moec.ir import CompileError, DType, OpDef, Value, all_ops, run
from moec.ir.promote import promote
from moec.ir.sampling import Sampler, cases
from moec.op_cases import single
from moec.passes.legalise import Legalise
from moec.tolerance import Bound, limits, one_node, scale_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SKIPPED = ("call.graph",)


class Shaped(Sampler):
    """Floats of a distribution."""

    def __init__(self, n: int, m: int, k: int, kind: str):
        super().__init__(n, m, k)
        self.kind = kind

    def floats(self, *shape: int, dtype: str = "f32", positive: bool = False) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator)
        if self.kind == "offset":
            x = x + 3
        elif self.kind == "heavy":
            x = x * torch.randn(shape, generator=self.generator).square()
        return (x.abs() + 0.1 if positive else x).to(DType.of(dtype).torch)


SIZES = ((33, 24, 40), (7, 16, 512))
KINDS = ("normal", "offset", "heavy")


def long_cases(opdef: OpDef, kind: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Reductions as long as in large models."""
    r = Shaped(16, 8, 0, kind)
    match opdef.name:
        case "linear.linear":
            for k in (1024, 7168):
                yield [r.floats(16, k), r.floats(32, k)], {}
        case "norm.rms" | "norm.layer":
            for k in (1024, 7168):
                yield [r.floats(16, k), r.floats(k)], {}
        case "norm.add_rms":
            for k in (1024, 7168):
                yield [r.floats(16, k), r.floats(16, k), r.floats(k)], {}
        case "attention.sdpa":
            for t, d in ((300, 64), (1500, 128)):
                yield [r.floats(1, 4, 9, d), r.floats(1, 2, t, d), r.floats(1, 2, t, d)], {"scale": d**-0.5}
        case "moe.experts":
            x, w, experts = r.floats(24, 512), r.floats(24, 2, positive=True), r.ints(0, 4, 24, 2)
            yield [x, w / w.sum(-1, keepdim=True), experts, r.floats(4, 512, 512) / 22, r.floats(4, 512, 256) / 16], {}
        case "math.sum" | "math.mean" | "math.softmax" | "math.cumsum":
            yield [r.floats(8, 7168)], {} if opdef.name in ("math.softmax", "math.cumsum") else {"axes": (-1,)}


@dataclass
class Row:
    cases: int = 0
    errors: dict[str, list[float]] = field(default_factory=dict)  # what → [max, rms] in units of the tolerances
    seen: float = 0.0


def converted(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype == torch.float32 else t


def judged(a: torch.Tensor, b: torch.Tensor, bound: Bound, scale: float) -> tuple[float, float]:
    most, typical = limits(bound, a, scale)
    d = difference(a, b, replace(bound, typical=math.inf), scale)
    return d.max_error / most if most else 0.0, d.relative_error / typical


def add(row: Row, what: str, found: tuple[float, float]) -> None:
    row.errors[what] = [max(x, y) for x, y in zip(row.errors.get(what, [0.0, 0.0]), found, strict=True)]


def seen(want: torch.Tensor, bound: Bound, scale: float) -> float:
    """The smallest factor 1 + e that is out of tolerance, as e."""
    for power in range(-184, 32):
        e = 2.0 ** (power / 8)
        if not difference(want, (want.double() * (1 + e)).to(want.dtype), bound, scale).ok:
            return e
    return math.inf


def measure(opdef: OpDef, dtype: torch.dtype) -> Row:
    row = Row()
    backend = get_backend("onnxruntime")
    for kind in KINDS:
        given = [c for n, m, k in SIZES for c in cases(opdef, Shaped(n, m, k, kind))] + list(long_cases(opdef, kind))
        for operands, attrs in given:
            operands = [converted(t, dtype) for t in operands]
            try:
                graph = single(opdef, operands, attrs)
                inputs = [t for t in operands if t is not None]
                want = run(graph, inputs)
                wide = promote(graph)
                truth = run(wide, [t.to(v.dtype.torch) for t, v in zip(inputs, wide.inputs, strict=True)])
                legal = Legalise(backend).run(graph)
                got = backend.compile(legal, threads=1).run(inputs)
            except CompileError:
                continue
            row.cases += 1
            node = next(iter(graph.nodes))
            values: dict[Value, torch.Tensor] = dict(zip(graph.inputs, inputs, strict=True))
            if node.op == "moe.route" and not (torch.equal(want[1], got[1]) and torch.equal(want[1], truth[1])):
                continue  # near ties, broken differently
            for r, w, t, g in zip(node.results, want, truth, got, strict=True):
                if not w.is_floating_point() or not w.any() or w.dtype != dtype or not w.isfinite().all():
                    continue
                bound, scale = one_node(node, r, {}), scale_of(w, node, values)
                if t.is_floating_point():
                    add(row, "reference", judged(t, w.double(), bound, scale_of(t, node, values)))
                    add(row, "onnxruntime", judged(t, g.double(), bound, scale_of(t, node, values)))
                add(row, "judged", judged(w, g, bound, scale))
                if w.numel() >= 64:
                    row.seen = max(row.seen, seen(w, bound, scale))
    return row


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    what = ("reference", "onnxruntime", "judged")
    print(f"{'op':24}{'dtype':9}{'cases':>6}" + "".join(f"{w + ' max':>17}{'rms':>8}" for w in what) + f"{'seen':>10}")
    for opdef in all_ops() if not wanted else [o for o in all_ops() if o.name in wanted or o.family in wanted]:
        if opdef.name in SKIPPED or opdef.samples is None or opdef.family == "tensor":
            continue
        for dtype in DTYPES:
            row = measure(opdef, dtype)
            if not row.errors:
                continue
            cells = "".join("{:17.2f}{:8.2f}".format(*row.errors.get(w, (0, 0))) for w in what)
            print(f"{opdef.name:24}{str(dtype)[6:]:9}{row.cases:6}{cells}{row.seen:10.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
