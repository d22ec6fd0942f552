"""A pytest plugin: files `*.ir` in folders named `texts` are tests (see `moec.text_cases` for their form).

    # conftest.py at the top of your project
    pytest_plugins = ["moec.text_tests"]

    pytest tests/texts            runs them
    pytest tests/texts --accept   writes the results of cases that have no or other expectations into the files

Your own rules are named by module, `// RUN: my_rules:FuseX`, or by file, from the folder of the text file:
`// RUN: fuse_x.py:FuseX`. `--accept` only ever writes results that verify and mean the same, and leaves RUN lines and
comments alone; a case that it rewrites passes. Another folder name is set by `moec_texts = name` in the pytest
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moec")
    group.addoption("--accept", action="store_true", help="write the results of text tests into their files")
    parser.addini("moec_texts", "name of the folders that hold text tests", default="texts")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> TextFile | None:
    if file_path.suffix == ".ir" and parent.config.getini("moec_texts") in file_path.parent.parts:
        return TextFile.from_parent(parent, path=file_path)
    return None


class TextFile(pytest.File):
    """One file; its cases are items, named after their first comment."""

    def collect(self) -> Iterator[TextItem]:
        from moec.text_cases import read_cases

        try:
            cases = read_cases(self.path)
        except AssertionError as e:
            raise self.CollectError(str(e)) from None
        if not cases:
            raise self.CollectError(f"{self.path}: the file has no case; see moec.text_cases for the form")
        seen: dict[str, int] = {}
        for number, case in enumerate(cases):
            name = re.sub(r"[^\w+-]+", "_", case.title).strip("_")[:60] or f"line{case.start + 1}"
            seen[name] = seen.get(name, 0) + 1
            name += f"_{seen[name]}" if seen[name] > 1 else ""
            yield TextItem.from_parent(self, name=name, number=number, line=case.start)


class TextItem(pytest.Item):
    def __init__(self, *, number: int, line: int, **about: Any):
        super().__init__(**about)
        self.number = number
        self.line = line

    def runtest(self) -> None:
        from moec.text_cases import accept, read_cases, run_case

        # read again: an accepted case before this one has moved its lines
        case = read_cases(self.path)[self.number]
        outcome = run_case(case)
        if outcome.accept is not None and self.config.getoption("--accept"):
            accept(self.path, [(case, outcome.accept)])
        elif outcome.problem is not None:
            raise TextFailure(outcome.problem)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, TextFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.line, self.name


class TextFailure(Exception):
    """A text test's problem, shown without a traceback."""
