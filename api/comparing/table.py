"""A comparison as text."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moec.comparing.nodes import NodeResult
    from moec.comparing.result import Comparison

SHOWN_FLIPS = 5


def render(c: Comparison) -> str:
    """Tables of outputs and of nodes (or values inside) by op; then the first divergence, flips and notes."""
    out = StringIO()
    console = Console(file=out, width=120)
    if c.outputs:
        console.print(_outputs(c))
    if c.nodes:
        console.print(_by_op("nodes by themselves, with the reference's operands", c.nodes))
    if c.values and not all(v.ok for v in c.values):
        console.print(_by_op("values inside, end to end", c.values))
    lines = [f"{name}: {count} nodes ran in the reference interpreter" for name, count in c.fallbacks.items() if count]
    lines += [f"{name}: peak memory {size / 2**20:.0f} MiB" for name, size in c.peak_bytes.items()]
    lines += c.notes
    if c.first_divergence is not None:
        lines.append(str(c.first_divergence))
    lines += map(str, c.routing_flips[:SHOWN_FLIPS])
    if len(c.routing_flips) > SHOWN_FLIPS:
        lines.append(f"{len(c.routing_flips) - SHOWN_FLIPS} more routing flips")
    if c.values and not c.nodes:
        lines.append(f"{sum(v.ok for v in c.values)} of {len(c.values)} values inside in tolerance")
    for line in (*lines, "ok" if c.ok else "NOT ok"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return out.getvalue()


def _outputs(c: Comparison) -> Table:
    informs = bool(c.outputs) and not any(o.judged for o in c.outputs)
    judged = " (for information: judged node by node)" if informs else ""
    table = Table(title=f"outputs against {c.reference}{judged}", title_justify="left")
    for column in ("backend", "output", "max error", "mean error", "relative", "1 − cosine", "tolerance", "why", ""):
        table.add_column(column, justify="left" if column in ("backend", "output", "why", "") else "right")
    for row in c.outputs:
        d = row.difference
        mark = ("ok" if d.ok else "NOT ok") if row.judged else ""
        figures = (d.max_error, d.mean_error, d.relative_error, max(0.0, 1 - d.cosine), d.tolerance)
        table.add_row(row.backend, row.output, *(f"{x:.2g}" for x in figures), d.why, mark)
    return table


def _by_op(title: str, results: Sequence[NodeResult]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("backend", "op", "nodes", "worst error", "its tolerance", "ok"):
        table.add_column(column, justify="left" if column in ("backend", "op") else "right")
    groups: dict[tuple[str, str], list[NodeResult]] = {}
    for n in results:
        groups.setdefault((n.backend, n.op), []).append(n)
    for (backend, op), rows in sorted(groups.items()):
        worst = max(rows, key=lambda n: (not n.ok, n.difference.badness))
        d = worst.difference
        good = sum(n.ok for n in rows)
        table.add_row(backend, op, str(len(rows)), f"{d.max_error:.2g}", f"{d.tolerance:.2g}", f"{good}/{len(rows)}")
    return table
