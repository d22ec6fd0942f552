"""The replay page: one HTML file without outside parts that steps through the passes of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.passes.base import Record


@dataclass(frozen=True)
class Step:
    """A pass: its record as plain data, and the rows (mark, line) that compare the graph before and after."""

    record: dict[str, Any]
    rows: tuple[tuple[str, str], ...]

    @staticmethod
    def of(record: Record, rows: Sequence[tuple[str, str]]) -> Step:
        return Step(record.to_dict(), tuple(rows))


def page(steps: Sequence[Step]) -> str:
    """The page. Every distinct line is stored once."""
    index: dict[str, int] = {}
    data = []
    for step in steps:
        marks = "".join(mark for mark, _ in step.rows)
        lines = [index.setdefault(line, len(index)) for _, line in step.rows]
        data.append({**step.record, "marks": marks, "lines": lines})
    text = json.dumps({"lines": list(index), "steps": data}, default=str, separators=(",", ":"))
    return _PAGE.replace("/*DATA*/", text.replace("<", "\\u003c"))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>passes</title><style>
:root { --line: #d8dee4; --soft: #57606a; --page: #fff; --ink: #1b1f24; --add: #dafbe1; --cut: #ffebe9;
  --here: #ddf4ff }
@media (prefers-color-scheme: dark) { :root { --line: #30363d; --soft: #9aa4ae; --page: #16191d; --ink: #e6e8eb;
  --add: #12361f; --cut: #48191c; --here: #123047 } }
* { box-sizing: border-box } body { margin: 0; font: 14px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); display: grid; grid-template: auto 1fr / 17rem 1fr; height: 100vh }
header { grid-column: 1 / 3; padding: .6rem 1rem; border-bottom: 1px solid var(--line); display: flex; gap: 1rem;
  align-items: center; flex-wrap: wrap } header b { font-size: 1rem } header span { color: var(--soft) }
nav { overflow: auto; border-right: 1px solid var(--line); padding: .3rem 0 }
nav h2 { font-size: .75rem; text-transform: uppercase; color: var(--soft); margin: .7rem 1rem .1rem; font-weight: 600 }
nav button { display: flex; width: 100%; gap: .5rem; justify-content: space-between; border: 0; background: none;
  color: inherit; font: inherit; padding: .15rem 1rem; text-align: left; cursor: pointer }
nav button[aria-current=true] { background: var(--here) } nav small { color: var(--soft); white-space: nowrap }
nav .same { color: var(--soft) } main { overflow: auto; padding: .6rem 0 }
main > p, main > ul { margin: .2rem 1rem } main ul { padding-left: 1.2rem; color: var(--soft) }
pre { margin: .6rem 0; font: 12.5px/1.45 ui-monospace, monospace; min-width: max-content }
pre div { padding: 0 1rem; white-space: pre } .add { background: var(--add) } .cut { background: var(--cut) }
.skip { color: var(--soft); cursor: pointer } .skip:hover { background: var(--here) }
input[type=search] { font: inherit; padding: .1rem .4rem; width: 15rem; color: inherit; background: var(--page);
  border: 1px solid var(--line) } label { color: var(--soft) }
</style></head><body>
<header><b id="title"></b><span id="facts"></span>
<label><input type="checkbox" id="whole"> whole graph</label>
<input type="search" id="filter" placeholder="only lines that contain…" aria-label="only lines that contain">
<span>← → step</span></header>
<nav id="passes"></nav><main id="view" tabindex="0"></main>
<script id="data" type="application/json">/*DATA*/</script>
<script>
const { lines, steps } = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), CONTEXT = 3;
let at = Math.max(0, steps.findIndex(s => /[-+]/.test(s.marks))), open = new Set();
function element(name, text, kind) {
  const e = document.createElement(name);
  if (text !== undefined) e.textContent = text;
  if (kind) e.className = kind;
  return e;
}
function go(i) {
  at = Math.min(steps.length - 1, Math.max(0, i)); open = new Set(); location.hash = at + 1;
  draw(); $("view").scrollTop = 0;
}
function side() {
  $("passes").replaceChildren();
  let phase = null;
  steps.forEach((s, i) => {
    if (s.phase !== phase && s.phase) $("passes").append(element("h2", s.phase));
    phase = s.phase;
    const b = element("button", s.name, /[-+]/.test(s.marks) ? "" : "same"), n = s.nodes_after - s.nodes_before;
    b.append(element("small", n ? `${n > 0 ? "+" : "−"}${Math.abs(n)}` : ""));
    b.setAttribute("aria-current", i === at);
    b.onclick = () => go(i);
    $("passes").append(b);
  });
}
function draw() {
  side();
  const s = steps[at], wanted = $("filter").value.toLowerCase(), view = $("view");
  view.replaceChildren();
  if (!s) { view.append(element("p", "The pipeline is empty.")); return; }
  $("title").textContent = `${at + 1} of ${steps.length}: ${s.name}`;
  $("facts").textContent = `${s.nodes_before} → ${s.nodes_after} nodes, ${(s.seconds * 1000).toFixed(1)} ms`;
  const fired = Object.entries(s.fired).map(([r, n]) => `${r} ×${n}`).join(", ");
  if (fired) view.append(element("p", `fired: ${fired}`));
  const refused = Object.entries(s.refused);
  if (refused.length) {
    view.append(element("p", "refused:"));
    const list = element("ul");
    for (const [why, n] of refused) list.append(element("li", `${why} ×${n}`));
    view.append(list);
  }
  if (s.result) view.append(element("p", `result: ${s.result}`));
  if (!/[-+]/.test(s.marks)) view.append(element("p", "The graph stays as it is."));
  const near = new Uint8Array(s.marks.length);
  for (let i = 0; i < near.length; i++) if (s.marks[i] !== " ")
    near.fill(1, Math.max(0, i - CONTEXT), i + CONTEXT + 1);
  const pre = element("pre");
  let skipped = 0;
  const flush = end => {
    if (!skipped) return;
    const from = end - skipped, row = element("div", `  ⋯ ${skipped} lines`, "skip");
    row.onclick = () => {
      const y = view.scrollTop;
      for (let k = from; k < end; k++) open.add(k);
      draw(); view.scrollTop = y;
    };
    pre.append(row); skipped = 0;
  };
  for (let i = 0; i < s.marks.length; i++) {
    const text = lines[s.lines[i]], mark = s.marks[i];
    if (wanted) { if (!text.toLowerCase().includes(wanted)) continue; }
    else if (!near[i] && !$("whole").checked && !open.has(i)) { skipped++; continue; }
    flush(i);
    pre.append(element("div", mark + text, mark === "+" ? "add" : mark === "-" ? "cut" : ""));
  }
  flush(s.marks.length);
  view.append(pre);
}
addEventListener("keydown", e => {
  if (e.target.type === "search") return;
  if (e.key === "ArrowLeft") go(at - 1);
  else if (e.key === "ArrowRight") go(at + 1);
  else return;
  e.preventDefault();
});
addEventListener("hashchange", () => {
  const i = parseInt(location.hash.slice(1)) - 1;
  if (i >= 0 && i !== at) go(i);
});
$("whole").onchange = $("filter").oninput = draw;
if (parseInt(location.hash.slice(1)) > 0) at = Math.min(steps.length, parseInt(location.hash.slice(1))) - 1;
draw();
</script></body></html>
"""
