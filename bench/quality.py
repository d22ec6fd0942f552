"""Loss of the shipped model with its weights in fewer bits: `make bench-quality`.

Nats per byte on held-out text, of each domain and their mean, against the model in f32: on the reference, which
computes what the plan means, and on ONNX Runtime, whose products with integers round activations to i8 as well. `MB`:
linear and expert weights with their scales, as they are stored.
"""

from __future__ import annotations

import argparse
import math

import torch
from rich.console import Console
from rich.table import Table

import moec
from moec import models
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=64, help="KiB of each domain, at most 128")
    parser.add_argument("--backends", default="reference,onnxruntime")
    options = parser.parse_args()
    torch.set_num_threads(1)
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
