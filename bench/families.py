"""Every family of models: does it trace, is it right on each backend, does it generate, and does it take FP8?

    make matrix                                   all, in WORKERS processes; writes docs/models.md and build/models.json
    python bench/families.py jamba t5             some of them, shown only

Models are small, with random weights (tests/model_matrix.py). `trace`, `reference` and `onnxruntime` are held against
PyTorch's eager run at four shapes that were not traced: the largest error relative to the largest logit, 1e-4 at most.
`generate` (causal models) is greedy, three rows with padding on the left, 64 new tokens, past the window where a model
has one, and must give the tokens of transformers' own `generate`. `fp8`: W8A8 on the reference; how far its logits are
from those of f32 (‖error‖ / ‖logits‖, 0.2 at most) and which share of the linear and expert weights it covers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from other_families import OTHERS
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

COLUMNS = ("trace", "reference", "onnxruntime", "generate", "fp8")
SHAPES = ((1, 1), (2, 7), (3, 23), (1, 53))  # traced at (2, 12)
TOLERANCE, FP8_TOLERANCE = 1e-4, 0.2
NEW, PROMPT = 64, 13


@dataclass
class Cell:
    """One result: `ok` None where a question does not apply."""

    ok: bool | None
    text: str


@dataclass
class Row:
    family: str
    config: str
    cells: dict[str, Cell] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return all(c.ok is not False for c in self.cells.values())


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    if want.shape != got.shape or bool(got.isnan().any()):
        return float("inf")
    return float((want - got).abs().max() / want.abs().max().clamp(min=1e-30)) if want.numel() else 0.0


def measure(name: str) -> Row:
    """All columns of one family."""
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    row, checks = (_other if name in OTHERS else _causal)(name)
    for column in COLUMNS:
        if column not in checks:
            row.cells[column] = Cell(None, "–")
            continue
        try:
            row.cells[column] = checks[column]()
        except Exception as e:  # a cell says what went wrong, whatever it was
            row.cells[column] = Cell(False, f"{type(e).__name__}: {str(e).splitlines()[0]}"[:160])
    row.seconds = time.perf_counter() - start
    return row


Checks = dict[str, Callable[[], Cell]]


def _causal(name: str) -> tuple[Row, Checks]:
    from model_matrix import FAMILIES, Entry, build, call

    family = FAMILIES[name]
    entry = Entry(name, family.attention[0])
    model = build(entry, positions=128)
    module, arguments = call(entry, model)
    inputs = [
        {"input_ids": torch.randint(3, 29, shape, generator=_random(i)), "use_cache": False}
        for i, shape in enumerate(SHAPES)
    ]
    checks = _checks(module, arguments["kwargs"], arguments["dynamic_shapes"], inputs, lambda out: [out.logits])
    return Row(name, family.config), checks | {"generate": lambda: generated(model)}


def _other(name: str) -> tuple[Row, Checks]:
    other = OTHERS[name]
    torch.manual_seed(0)
    inputs = [other.inputs(*shape, _random(i)) for i, shape in enumerate(SHAPES)]

    def tensors(out: Any) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves(tuple(out.values()) if isinstance(out, dict) else out)
        return [t for t in leaves if isinstance(t, torch.Tensor)]

    example = other.inputs(2, 12, _random(9))
    return Row(name, other.shown), _checks(other.build().eval(), example, other.dynamic, inputs, tensors)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _checks(
    module: torch.nn.Module, example: dict[str, Any], dynamic: Any, inputs: list[dict[str, Any]],
    tensors: Callable[[Any], list[torch.Tensor]],
) -> Checks:  # fmt: skip
    import moec

    with torch.no_grad():
        wanted = [tensors(module(**given)) for given in inputs]

    def compiled(**more: Any) -> Any:
        return moec.compile(module, kwargs=example, dynamic_shapes=dynamic, **more)

    def trace() -> Cell:
        graph = moec.trace(module, kwargs=example, dynamic_shapes=dynamic)
        return Cell(True, f"{len(graph)} nodes")

    def backend(kind: str) -> Cell:
        program = compiled(backend=kind, threads=1)
        pairs = [p for w, g in zip(wanted, inputs, strict=True) for p in zip(w, tensors(program(**g)), strict=True)]
        error = max(relative_error(w, got) for w, got in pairs)
        return Cell(error <= TOLERANCE, f"{error:.1e}")

    def fp8() -> Cell:
        from moec.passes.coverage import quantized_coverage

        program = compiled(backend="reference", quantize="fp8")
        coverage = quantized_coverage(program.graph)
        if not coverage.candidate_bytes:
            return Cell(None, "no linear weights")
        pairs = [(w[0], tensors(program(**g))[0]) for w, g in zip(wanted, inputs, strict=True)]
        error = max(float((got - w).norm() / w.norm()) for w, got in pairs)
        return Cell(error <= FP8_TOLERANCE, f"{error:.1e}, {coverage.share:.0%}")

    return {
        "trace": trace,
        "reference": lambda: backend("reference"),
        "onnxruntime": lambda: backend("onnxruntime"),
        "fp8": fp8,
    }


def generated(model: Any) -> Cell:
    """Against transformers' own greedy loop."""
    import moec

    r = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 29, (3, PROMPT), generator=r)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, : PROMPT - 1] = 0, 0
    ids = torch.where(mask == 0, 0, ids)
    want = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    got = moec.compile(model, backend="onnxruntime", threads=1).generate(
        ids, mask, max_new_tokens=NEW, eos_token_id=None
    )
    if torch.equal(want, got):
        return Cell(True, f"{NEW} tokens")
    part = (want != got).any(0).nonzero()
    return Cell(False, f"differs from new token {int(part[0]) - PROMPT} on")


def _start() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def write(rows: list[Row]) -> None:
    """docs/models.md and build/models.json."""
    import transformers

    head = f"""# Models

What `make matrix` found: transformers {transformers.__version__}, torch {torch.__version__.split("+")[0]}, small models
with random weights. `reference` and `onnxruntime`: largest error to PyTorch's eager run, relative to the largest logit,
at shapes {", ".join(map(str, SHAPES))}, traced at (2, 12). `generate`: greedy, three rows with padding
on the left, {NEW} new tokens, equal to transformers'. `fp8`: ‖error‖ / ‖logits‖ and covered share of the weights.

| family | configuration | {" | ".join(COLUMNS)} |
|---|---|{"---|" * len(COLUMNS)}
"""
    lines = []
    for row in rows:
        cells = [
            ("" if c.ok is not False else "**") + c.text.replace("|", "/") + ("" if c.ok is not False else "**")
            for c in (row.cells[k] for k in COLUMNS)
        ]
        lines.append(f"| {row.family} | {row.config} | {' | '.join(cells)} |")
    green = sum(r.ok for r in rows)
    (ROOT / "docs" / "models.md").write_text(
        head + "\n".join(lines) + f"\n\n{green} of {len(rows)} rows hold.\n", "utf-8"
    )
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "models.json").write_text(json.dumps([asdict(r) for r in rows], indent=1), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from model_matrix import FAMILIES

    known = [*FAMILIES, *OTHERS]
    unknown = set(args.families) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    names = args.families or known
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(min(args.workers, len(names)), _start, maxtasksperchild=4) as pool:
        for row in pool.imap(measure, names):
            rows.append(row)
            shown = ", ".join(f"{k} {c.text}" for k, c in row.cells.items())
            print(f"{'ok ' if row.ok else 'NOT'} {row.family} ({row.seconds:.0f} s): {shown}", flush=True)
    if not args.families:
        write(rows)
    print(f"{sum(r.ok for r in rows)} of {len(rows)} rows hold")
    return int(not all(r.ok for r in rows))


if __name__ == "__main__":
    sys.exit(main())
