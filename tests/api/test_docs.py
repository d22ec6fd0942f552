"""Every Python block of README.md and docs/ runs, in order, in a fresh folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[tuple[int, str]]:
    text = path.read_text("utf-8")
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_code_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert blocks(path)
    namespace: dict = {"__name__": "docs"}
    for line, code in blocks(path):
        exec(compile("\n" * line + code, str(path), "exec"), namespace)


def test_links_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_folders_of_the_readme_exist():
    for name in re.findall(r"^\| `([a-z]+)/` \|", PAGES[0].read_text("utf-8"), re.M):
        assert (ROOT / name).is_dir(), name


def test_readme_opens_with_the_two_commands():
    head = PAGES[0].read_text("utf-8").split("\n## ")[0]
    assert head.index("make demo") < head.index("make test")
