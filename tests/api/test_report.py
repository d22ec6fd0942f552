"""Reports: what they hold, and files that are whole and self-contained."""

from __future__ import annotations

import json
import re

import pytest

import moec
from moec.progress import progress


@pytest.fixture
def compiled(mlp):
    return moec.compile(mlp, backend="onnxruntime", quantize="fp8", threads=1)


def test_to_dict(compiled):
    data = compiled.report.to_dict()
    assert json.loads(json.dumps(data, default=str))["backend"] == "onnxruntime"
    program = data["programs"]["forward"]
    names = [p["name"] for p in program["passes"]]
    assert names[-1] == "legalise"
    assert "quantize_weights" in names
    first = program["passes"][0]
    assert first["nodes_before"] == 4
    assert first["seconds"] >= 0
    assert program["figures"]["quantize_weights.share"] == 1.0
    assert program["ops"] == compiled.graph.count_ops()
    assert program["weights"]["bytes"]["f8e4m3fn"] == 32 * 16 + 8 * 32
    assert program["fallbacks"] == []


def test_html_is_self_contained(compiled, tmp_path):
    compiled.report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"(src|href)\s*=|https?:|<script|@import|url\(", text)
    for word in ("quantize_weights", "nodes before", "onnxruntime", "share", "norm.rms"):
        assert word in text
    assert text.count("<table") == text.count("</table>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_html_escapes_names(mlp, tmp_path):
    mlp.name = "<script>alert(1)</script>"
    moec.compile(mlp, backend="reference").report.save(tmp_path / "r.html")
    assert "<script>" not in (tmp_path / "r.html").read_text("utf-8")


class CountRms(moec.passes.Analysis):
    def run(self, graph):
        return {"norm.rms": len(graph.find("norm.rms"))}


class Never(moec.passes.Rewrite):
    def pattern(self, p, x):
        return p.rms(p.silu(x), p.any("w"), eps=p.attr())

    def replace(self, b, m):
        return m.x


def test_a_rule_that_is_applied_nowhere_says_why(mlp, tmp_path):
    compiled = moec.compile(mlp, backend="reference", passes=[CountRms(), Never()])
    found, unfired = compiled.report.notes()
    assert found == "forward: count_rms found {'norm.rms': 1}"
    assert unfired.startswith("forward: never (")
    assert "test_report.py:" in unfired
    assert "expected math.silu" in unfired
    assert unfired in str(compiled.report)
    compiled.report.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "never was applied nowhere" in page
    assert "expected math.silu" in page
    assert not moec.compile(mlp, backend="reference").report.notes()


def test_json(compiled, tmp_path):
    compiled.report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["programs"]["forward"]["passes"]


def test_text_lists_every_pass(compiled):
    text = str(compiled.report)
    for p in compiled.report.to_dict()["programs"]["forward"]["passes"]:
        assert p["name"] in text


def test_progress_is_silent_without_a_terminal(capfd):
    with progress("work") as step:
        step("one")
    assert capfd.readouterr() == ("", "")


def test_progress_shows_slow_work_on_a_terminal(monkeypatch, capfd):
    import sys
    import time

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("moec.progress.DELAY", 0.05)
    with progress("work") as step:
        step("one")
        time.sleep(0.4)
    assert "work: one" in capfd.readouterr().err
    monkeypatch.setattr("moec.progress.DELAY", 5.0)
    with progress("work") as step:
        step("two")
    assert "two" not in capfd.readouterr().err
