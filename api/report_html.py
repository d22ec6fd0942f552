"""The report as one HTML page without outside parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from moec.report import PREDICTED, chosen_forms

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin-top: 1.5rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; border-bottom: 1px solid #d8dee4 }
th { text-align: left; font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td { vertical-align: top } .none { color: #6b7280 } .warn { color: #9a3412 }
@media (prefers-color-scheme: dark) {
  body { background: #16191d; color: #e6e8eb } td, th { border-color: #30363d } .warn { color: #fdba74 }
}
"""


def page(data: Mapping[str, Any]) -> str:
    """HTML of `Report.to_dict()`."""
    title = f"{data['model']} on {data['backend']}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        _pairs({f"{k} (s)": f"{v:.2f}" for k, v in data["seconds"].items()}),
    ]
    for name, program in data["programs"].items():
        parts += [f"<h2>{escape(name)}</h2>", *_program(program)]
    return "\n".join([*parts, "</body></html>\n"])


def _program(p: Mapping[str, Any]) -> Iterable[str]:
    rows = [
        [
            r["name"],
            f"{r['seconds'] * 1000:.1f}",
            r["nodes_before"],
            r["nodes_after"],
            _counts(r["fired"]),
            _counts(r["refused"]),
        ]
        for r in p["passes"]
    ]
    yield "<h3>Passes</h3>"
    yield _table(["pass", "ms", "nodes before", "nodes after", "rules fired", "rules refused"], rows, {1, 2, 3})
    for r in p["passes"]:
        if "result" in r:
            yield f"<h3>{escape(r['name'])} found</h3><pre>{escape(r['result'])}</pre>"
        if r["unfired"]:
            yield f'<h3 class="warn">{escape(r["name"])} was applied nowhere</h3><pre>{escape(r["unfired"])}</pre>'
    if p["fallbacks"]:
        yield '<h3 class="warn">Nodes in the reference interpreter</h3>'
        yield _table(["op", "location", "reason"], [[f["op"], f["location"], f["reason"]] for f in p["fallbacks"]])
    yield "<h3>Figures</h3>"
    yield _pairs(p["figures"])
    for title, forms in chosen_forms(p["backend"]):
        yield f"<h3>{escape(title)}</h3>"
        yield _table(["form", PREDICTED, "nodes", "load s"], forms, {2, 3})
    plain = {k: v for k, v in p["backend"].items() if not k.endswith("experts")}
    yield "<h3>Backend</h3>"
    yield _pairs({**plain, **{f"{k} (s)": f"{v:.2f}" for k, v in p["seconds"].items()}})
    yield "<h3>Weights</h3>"
    yield _pairs(
        {"tensors": p["weights"]["count"], **{f"bytes {k}": f"{v:,}" for k, v in p["weights"]["bytes"].items()}}
    )
    yield "<h3>Nodes by op</h3>"
    yield _table(["op", "nodes"], [[k, v] for k, v in p["ops"].items()], {1})


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{k} ×{v}" for k, v in counts.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cells(tag: str, row: Sequence[Any]) -> str:
        marks = [' class="n"' if i in right else "" for i in range(len(row))]
        return "".join(f"<{tag}{m}>{escape(str(x))}</{tag}>" for m, x in zip(marks, row, strict=True))

    body = "".join(f"<tr>{cells('td', r)}</tr>" for r in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _pairs(pairs: Mapping[str, Any]) -> str:
    if not pairs:
        return '<p class="none">none</p>'
    return _table(["name", "value"], [[k, _value(v)] for k, v in pairs.items()])


def _value(v: Any) -> str:
    if isinstance(v, float):
        return f"{v:.4g}"
    if isinstance(v, Mapping):
        return ", ".join(f"{k}: {_value(x)}" for k, x in v.items())
    if isinstance(v, list | tuple):
        return ", ".join(map(_value, v)) or "none"
    return str(v)
