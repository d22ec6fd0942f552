"""A comparison as text."""

from __future__ import annotations

import math
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moec.comparison import Comparison
    from moec.isolated import NodeResult

SHOWN_FLIPS = 5


def render(c: Comparison) -> str:
    """Tables of outputs and, where compared in isolation, of nodes by op; then the first divergence and flips."""
    out = StringIO()
    console = Console(file=out, width=120)
    if c.outputs:
        console.print(_outputs(c))
    if c.nodes:
        console.print(_nodes(c))
    for name, count in c.fallbacks.items():
        if count:
            console.print(f"{name}: {count} nodes ran in the reference interpreter", markup=False)
    if c.first_divergence is not None:
        console.print(str(c.first_divergence), markup=False)
    for flip in c.routing_flips[:SHOWN_FLIPS]:
        console.print(str(flip), markup=False)
    if len(c.routing_flips) > SHOWN_FLIPS:
        console.print(f"{len(c.routing_flips) - SHOWN_FLIPS} more routing flips")
    console.print("ok" if c.ok else "NOT ok")
    return out.getvalue()


def _outputs(c: Comparison) -> Table:
    judged = "" if not c.isolated else " (for information: judged node by node)"
    table = Table(title=f"outputs against {c.reference}{judged}", title_justify="left")
    for column in ("backend", "output", "max error", "mean error", "tolerance", "why", ""):
        table.add_column(column, justify="right" if "error" in column or column == "tolerance" else "left")
    for row in c.outputs:
        d = row.difference
        mark = "" if c.isolated else ("ok" if d.ok else "NOT ok")
        table.add_row(row.backend, row.output, f"{d.max_error:.2g}", f"{d.mean_error:.2g}", f"{d.tolerance:.2g}", d.why,
                      mark)  # fmt: skip
    return table


def _nodes(c: Comparison) -> Table:
    table = Table(title="nodes by themselves, with the reference's operands", title_justify="left")
    for column in ("backend", "op", "nodes", "worst error", "its tolerance", "ok"):
        table.add_column(column, justify="left" if column in ("backend", "op") else "right")
    groups: dict[tuple[str, str], list[NodeResult]] = {}
    for n in c.nodes:
        groups.setdefault((n.backend, n.op), []).append(n)
    for (backend, op), rows in sorted(groups.items()):
        worst = max(rows, key=lambda n: (not n.ok, _share(n)))
        d = worst.difference
        good = sum(n.ok for n in rows)
        table.add_row(backend, op, str(len(rows)), f"{d.max_error:.2g}", f"{d.tolerance:.2g}", f"{good}/{len(rows)}")
    return table


def _share(n: NodeResult) -> float:
    d = n.difference
    return d.max_error / d.tolerance if d.tolerance else (math.inf if d.max_error else 0.0)
