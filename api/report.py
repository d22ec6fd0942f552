"""What compilation did, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.files import written_whole

if TYPE_CHECKING:
    from rich.table import Table

    from moec.program import Program


@dataclass(eq=False)
class Report:
    """The report of a compiled model: per program (the plain forward, and the cached decoder once it exists)
    its passes, figures such as quantised-byte coverage, fallbacks and backend statistics."""

    model: str
    backend: str
    programs: dict[str, Program]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"model", "backend", "seconds", "programs": {name: {"passes", "figures", "fallbacks",
        "ops", "weights", "backend", "seconds"}}}. Seconds are wall-clock; bytes count stored weights."""
        programs = {name: _program(p) for name, p in self.programs.items()}
        return {"model": self.model, "backend": self.backend, "seconds": dict(self.seconds), "programs": programs}

    def save(self, path: str | Path) -> None:
        """Write a self-contained HTML page, or JSON where the name ends in .json; complete or not at all. Raises
        ArgumentValueError where it cannot be written."""
        from moec.report_html import page

        target = Path(path)
        data = self.to_dict()
        text = json.dumps(data, indent=2, default=str) if target.suffix == ".json" else page(data)
        with written_whole(target) as (partial,):
            partial.write_text(text, "utf-8")

    def tables(self) -> list[Table]:
        """rich tables of the passes of each program."""
        from rich.table import Table

        found = []
        for name, program in self.to_dict()["programs"].items():
            table = Table(title=f"{self.model} on {self.backend}: {name}", title_justify="left")
            for column in ("pass", "ms", "nodes"):
                table.add_column(column, justify="left" if column == "pass" else "right")
            table.add_column("rules fired")
            table.add_column("refused")
            for p in program["passes"]:
                table.add_row(
                    p["name"],
                    f"{p['seconds'] * 1000:.0f}",
                    f"{p['nodes_before']} → {p['nodes_after']}",
                    ", ".join(f"{rule} ×{n}" for rule, n in p["fired"].items()),
                    ", ".join(f"{why} ×{n}" for why, n in p["refused"].items()),
                )
            found.append(table)
            found += [_experts(f"{name}: {title}", rows) for title, rows in chosen_forms(program["backend"])]
        return found

    def notes(self) -> list[str]:
        """Sentences: what analyses found, rules that were applied nowhere and why, nodes outside the backend."""
        found = []
        for name, program in self.to_dict()["programs"].items():
            for p in program["passes"]:
                found += [f"{name}: {p['name']} found {p['result']}"] if "result" in p else []
                found += [f"{name}: {p['unfired']}"] if p["unfired"] else []
            found += [
                f"{name}: {f['op']} at {f['location']} runs in the reference: {f['reason']}"
                for f in program["fallbacks"]
            ]
            found += [f"{name}: {note}" for note in _loading(program["backend"])]
        return found

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        console = Console(file=out, width=140)
        for table in self.tables():
            console.print(table)
        for note in self.notes():
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        return out.getvalue()


def chosen_forms(stats: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Of each kind of layers of experts: what they are, and of each form its name, predicted time by token count, nodes
    and seconds to load, or why it is not possible. The chosen one comes first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for key, layers in stats.items():
        for layer in layers if key.endswith("experts") and isinstance(layers, list) else []:
            kinds.setdefault(json.dumps({**layer, "module": ""}, sort_keys=True, default=str), []).append(layer)
    found = []
    for layers in kinds.values():
        first = layers[0]
        num, k, width, hidden = first["experts"]
        what = f"{len(layers)} layer{'s' if len(layers) > 1 else ''} of {num} experts ({width} × {hidden}, {k} a token)"
        rows = []
        for form, cost in sorted(first["costs"].items(), key=lambda item: item[0] != first["form"]):
            taken = (", asked for" if first["asked"] else ", chosen") if form == first["form"] else ""
            times = ", ".join(f"{ms:.3g} ({tokens})" for tokens, ms in cost["ms"].items())
            rows.append((form + taken, times, str(cost["nodes"]), f"{cost['load_seconds']:.1f}"))
        rows += [(form, f"not possible: {why}", "", "") for form, why in first["refused"].items()]
        found.append((what, rows))
    return found


def _experts(title: str, rows: list[tuple[str, str, str, str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("form", PREDICTED, "nodes", "load s"):
        table.add_column(column, justify="right" if column in ("nodes", "load s") else "left")
    for row in rows:
        table.add_row(*row)
    return table


PREDICTED = "predicted ms on one core (tokens)"


def _loading(stats: Mapping[str, Any]) -> list[str]:
    """What is worth knowing of how sessions came about; those of a split program have a prefix."""
    found = []
    for key, value in stats.items():
        if key.endswith("memory") and isinstance(value, dict) and "why" in value:
            found.append(f"{key} is {value['mode']!r}: {value['why']}")
        if key.endswith("cache") and isinstance(value, dict):
            seconds = ", ".join(f"{what} {s:.2f} s" for what, s in value["seconds"].items())
            why = f": {value['why']}" if "why" in value else ""
            found.append(f"{key} {value['result']}{why} ({seconds})")
            found += [f"{key}: {value['warning']}"] if "warning" in value else []
    return found


def _program(program: Program) -> dict[str, Any]:
    weights = [v.type for v in program.graph.weights.values()]
    by_dtype: dict[str, int] = {}
    for t in weights:
        size = t.nbytes
        assert isinstance(size, int)
        by_dtype[str(t.dtype)] = by_dtype.get(str(t.dtype), 0) + size
    figures: dict[str, Any] = {}
    for record in program.records:
        figures.update({f"{record.name}.{key}": value for key, value in record.figures.items()})
    return {
        "passes": [r.to_dict() for r in program.records],
        "figures": figures,
        "fallbacks": [{"op": f.op, "location": f.location, "reason": f.reason} for f in program.fallbacks],
        "ops": program.graph.count_ops(),
        "weights": {"count": len(weights), "bytes": by_dtype},
        "backend": dict(program.executable.stats),
        "seconds": dict(program.seconds),
    }
