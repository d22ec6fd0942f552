"""Every code block of README.md and docs/ runs, in order, in a fresh folder; one with a title becomes that file."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TABLES = {"models.md"}  # written by `make matrix`
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in TABLES)]


def blocks(path: Path) -> list[tuple[int, str, str | None, str]]:
    """(line, language, title, text)"""
    text = path.read_text("utf-8")
    found = re.finditer(r'^```(python|sh)(?: title="([^"]+)")?\n(.*?)^```', text, re.S | re.M)
    return [(text.count("\n", 0, m.start(3)), m[1], m[2], m[3]) for m in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh current folder, whose modules are forgotten afterwards, as those of other tests' folders before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _forget(tmp_path.parent)
    yield tmp_path
    _forget(tmp_path)


def _forget(folder):
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{folder}/"):
            del sys.modules[name]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_code_runs(path, folder, capsys):
    assert blocks(path)
    namespace: dict = {"__name__": "docs"}
    for line, language, title, code in blocks(path):
        if title is not None:
            (folder / title).write_text(code, "utf-8")
            if title.startswith("test_"):  # as pytest would, without another process
                found = vars(importlib.import_module(title.removesuffix(".py")))
                for test in [v for k, v in found.items() if k.startswith("test_")]:
                    test()
        elif language == "sh":
            programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["sh", "-ec", code], env=os.environ | {"PATH": programs}, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{path.name}:{line}\n{done.stdout}{done.stderr}"
        else:
            exec(compile("\n" * line + code, str(path), "exec"), namespace)


def test_what_the_tutorial_takes():
    """The fusion, its test and the op with both lowerings are as short as they are promised to be."""
    files = {title: code for _, _, title, code in blocks(ROOT / "docs" / "custom-pass.md") if title}
    fusion = files["rules.py"][files["rules.py"].index("class FuseSoftCap") :]
    test = files["test_rules.py"][files["test_rules.py"].index("def test_") :]
    lines = [len(text.rstrip().split("\n")) for text in (fusion, test, files["soft_cap.py"])]
    assert all(n <= most for n, most in zip(lines, [12, 6, 40], strict=True)), lines


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
