"""Whether the Triton backend agrees with the reference on this machine's GPU: `make check-gpu`.

Every op on its samples (as `moec.testing.check_op` does), and the stored graphs of tests/graphs end to end in their own
dtypes and node by node under FP8. Several processes share the GPU, because most of the time is compilation. Writes
build/gpu_agreement.json; exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    kind: str  # op | graph | fp8
    name: str
    verdict: str  # ok | refused | differs | failed
    detail: str
    seconds: float


def check(kind: str, name: str) -> Row:
    """One op or graph."""
    start = time.perf_counter()
    verdict, detail = _op(name) if kind == "op" else _graph(name, kind == "fp8")
    return Row(kind, name, verdict, detail, time.perf_counter() - start)


def _op(name: str) -> tuple[str, str]:
    from moec.testing import check_op

    try:
        return "ok", str(check_op(name, backends=("triton",))).replace("\n", ";")
    except AssertionError as e:
        return "differs", str(e)
    except Exception:  # a crash is a finding of its own kind, and the other checks go on
        return "failed", traceback.format_exc(limit=-3)


def _graph(name: str, quantised: bool) -> tuple[str, str]:
    import moec
    from moec.graph_file import load_graph
    from moec.ir.cases import with_data
    from moec.ir.equivalence import Oracle

    graph = with_data(load_graph(ROOT / "tests" / "graphs" / f"{name}.ir")[0])
    case = max((c for c in Oracle(graph).cases if c.pin is None), key=lambda c: sum(t.numel() for t in c.inputs))
    options = {"quantize": "fp8", "isolated": True} if quantised else {}
    try:
        found = moec.compare(graph, case.inputs, backends=("reference", "triton"), **options)
    except moec.CompileError as e:
        return "refused" if e.code == "coverage" else "failed", str(e)
    except Exception:  # a crash is a finding of its own kind, and the other checks go on
        return "failed", traceback.format_exc(limit=-3)
    flips = f"; {len(found.routing_flips)} near-tied flips" if found.routing_flips else ""
    if found.ok:
        worst = max(o.difference.badness for o in found.outputs)
        return "ok", f"largest error of an output in units of its tolerance {worst:.2g}{flips}"
    return "differs", f"{found.first_divergence}{flips}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--graphs", default="*", help="glob of stored graphs")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_agreement.json")
    args = parser.parse_args()

    import torch

    from moec.ir.opdef import all_ops

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    graphs = sorted(p.stem for p in (ROOT / "tests" / "graphs").glob(f"{args.graphs}.ir"))
    jobs = [("op", o.name) for o in all_ops() if o.family not in ("extern", "call")]
    jobs += [("graph", g) for g in graphs] + [("fp8", g) for g in graphs if ".bf16" not in g]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(check, *job) for job in jobs]):
            rows.append(done.result())
            args.out.parent.mkdir(exist_ok=True, parents=True)
            args.out.write_text(json.dumps({"card": card, "rows": [vars(r) for r in rows]}, indent=1))
    for kind in ("op", "graph", "fp8"):
        counts: dict[str, int] = {}
        for r in rows:
            if r.kind == kind:
                counts[r.verdict] = counts.get(r.verdict, 0) + 1
        print(f"{card}: {kind}: {counts}")
    for r in sorted(rows, key=lambda r: (r.kind, r.name)):
        if r.verdict not in ("ok", "refused"):
            print(f"{r.kind} {r.name}: {r.verdict}: {r.detail[:400]}")
    return int(any(r.verdict not in ("ok", "refused") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
