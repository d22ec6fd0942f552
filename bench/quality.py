"""Loss of the shipped model with its weights in fewer bits: `make bench-quality`.

Nats per byte on held-out text, of each domain and their mean, against the model in f32: on the reference, which
computes what the plan means, and on ONNX Runtime, whose products with integers round activations to i8 as well. `MB`:
linear and expert weights with their scales, as they are stored. With `--formulas`: ways to choose the scales of int4,
by the model in PyTorch with rounded weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import moec
from moec import models
from moec.ir import DType
from moec.ir.ops import block_codes
from moec.passes import default_pipeline
from moec.passes.coverage import candidates, root_weight

Plan = moec.Quantization
PLANS: dict[str, str | Plan | None] = {
    "f32": None,
    "fp8": "fp8",
    "fp8-weight-only": "fp8-weight-only",
    "int8 (blocks of 128)": "int8",
    "int8, blocks of 32": Plan("i8", None, (1, 32)),
    "int8, lm_head kept": Plan("i8", None, keep=("lm_head",)),
    "int4, blocks of 16": Plan("i4", None, (1, 16)),
    "int4 (blocks of 32)": "int4",
    "int4, blocks of 64": Plan("i4", None, (1, 64)),
    "int4, blocks of 128": Plan("i4", None, (1, 128)),
    "int4, lm_head kept": Plan("i4", None, keep=("lm_head",)),
    "int4, lm_head in int4": Plan("i4", None, in_i8=()),
}
DOMAINS = ("literature", "code")


def stored_bytes(graph: moec.Graph) -> int:
    """Of linear and expert weights and their scales."""
    found = {}
    for node in graph.nodes:
        values = list(candidates(node))
        values += [v for v in node.operands if v is not None and v.weight is not None and "scale" in v.weight.name]
        for v in values:
            for w in v.producer.operands if v.producer is not None and v.producer.op == "quant.dequantize" else (v,):
                root = None if w is None else root_weight(w)
                if root is not None and root.weight is not None:
                    found[root.weight.name] = root.type.nbytes
    return sum(n for n in found.values() if isinstance(n, int))


def losses(compiled: moec.CompiledModel, sample: int) -> list[float]:
    """Nats per byte on the first `sample` bytes of each domain."""
    texts = [models.heldout_text(d)[:sample] for d in DOMAINS]
    return [models.bits_per_byte(lambda ids: compiled(ids)[0], t) * math.log(2) for t in texts]


def amax_over_7(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return one_scale(x, block, lambda parts: parts.abs().amax(-1, keepdim=True) / 7)


def largest_is_minus_8(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return one_scale(x, block, lambda parts: parts.gather(-1, parts.abs().argmax(-1, keepdim=True)) / -8)


def one_scale(x: torch.Tensor, block: tuple[int, int], scale: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    parts = block_codes.in_blocks(x, block)
    s = scale(parts)
    return block_codes.from_blocks((parts / s).round().clamp(-8, 7) * s, tuple(x.shape), block)


def as_stored(dtype: DType) -> Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]:
    def rounded(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        return block_codes.dequantize_blocks(*block_codes.quantize_blocks(x, block, dtype), block)

    return rounded


@torch.no_grad()
def formulas(sample: int) -> None:
    """Of int4 in blocks of 32, lm_head in int8."""
    steps, block = block_codes.STEPS, (1, 32)
    ways = {
        "amax / 7": (steps, amax_over_7),
        "m / −8": (steps, largest_is_minus_8),
        "least squares, ±m / 8": ((8.0,), as_stored(DType.I4)),
        f"least squares, {2 * len(steps)} scales": (steps, as_stored(DType.I4)),
        "least squares, 52 scales": (tuple(6.5 + 0.1 * i for i in range(26)), as_stored(DType.I4)),
    }
    first = None
    for name, (tried, way) in {"f32": (steps, None), **ways}.items():
        block_codes.STEPS = tried
        model = models.trained()
        for path, p in model.named_parameters():
            if way is not None and p.dim() > 1 and not path.endswith(("embed_tokens.weight", "gate.weight")):
                p.copy_((as_stored(DType.I8) if "lm_head" in path else way)(p, block))
        each = [models.bits_per_byte(model, models.heldout_text(d)[:sample]) * math.log(2) for d in DOMAINS]
        mean = sum(each) / 2
        first = first or mean
        print(f"| {name} | {each[0]:.4f} | {each[1]:.4f} | {mean - first:+.4f} |", flush=True)
    block_codes.STEPS = steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=64, help="KiB of each domain, at most 128")
    parser.add_argument("--backends", default="reference,onnxruntime")
    parser.add_argument("--formulas", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.formulas:
        formulas(options.sample << 10)
        return
    backends = options.backends.split(",")
    example = torch.zeros(2, 24, dtype=torch.int64)
    graph = moec.trace(models.trained(), (example,), dynamic_shapes="auto")
    columns = [f"{b}: {c}" for b in backends for c in (*DOMAINS, "change")]
    table = Table("weights", "MB", *columns, title=f"loss in nats per byte, {options.sample} KiB of each domain")
    first: dict[str, float] = {}
    rows = []
    for name, quantize in PLANS.items():
        after, _ = default_pipeline(quantize).run(graph)
        row = [name, f"{stored_bytes(after) / 1e6:.2f}"]
        for backend in backends:
            compiled = moec.compile(graph, backend=backend, quantize=quantize, threads=1)
            each = losses(compiled, options.sample << 10)
            mean = sum(each) / len(each)
            change = mean - first.setdefault(backend, mean)
            row += [*(f"{x:.4f}" for x in each), f"{change:+.4f} ({change / first[backend]:+.2%})"]
        table.add_row(*row)
        rows.append("| " + " | ".join(row) + " |")
        print(rows[-1], flush=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
