"""The pytest plugin that comes with moec: a `backend` fixture, and a folder for each failed comparison.

    def test_my_model(backend):
        assert_backends_agree(model, (x,), backends=("reference", backend))

    pytest --moec-backends onnxruntime,triton     runs the test once for each
    pytest --moec-repro FOLDER                    where failed comparisons go; default: in pytest's cache folder

A backend is a name, `module:name` or `path.py:name`. A project's own fixture called `backend` takes this one's place.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

DEFAULT = "onnxruntime"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moec")
    group.addoption("--moec-backends", default=None, metavar="NAMES", help=f"of the `backend` fixture ({DEFAULT})")
    group.addoption("--moec-repro", default=None, metavar="FOLDER", help="where failed comparisons are saved")
    parser.addini("moec_backends", "comma-separated backends of the `backend` fixture", default=DEFAULT)


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("--moec-backends") or config.getini("moec_backends")
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise pytest.UsageError(f"--moec-backends {text!r} names no backend")
    config.pluginmanager.register(_fixtures(names), "moec-backend-fixture")


def _fixtures(names: list[str]) -> object:
    class Fixtures:
        @pytest.fixture(params=names)
        def backend(self, request: pytest.FixtureRequest) -> Any:
            """A backend for `moec.compile` and `moec.compare`, once for each of --moec-backends."""
            from moec.backend_spec import parse_backend
            from moec.ir import CompileError

            try:
                return parse_backend(request.param)
            except CompileError as e:
                raise pytest.UsageError(f"--moec-backends: {e.message}") from None

    return Fixtures()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    comparison = getattr(call.excinfo.value, "comparison", None) if call.excinfo is not None else None
    if comparison is not None and hasattr(comparison, "save_repro"):
        report.sections.append(("moec", _saved(item, comparison)))
    return report


def _saved(item: pytest.Item, comparison: Any) -> str:
    first = comparison.first_divergence
    if first is None:
        return "no node diverges by itself, so there is nothing to save"
    name = re.sub(r"[^\w.-]+", "_", item.nodeid).strip("_")[-120:]
    folder = _folder(item.config) / name
    try:
        comparison.save_repro(folder)
    except OSError as e:
        return f"{first}\nnot saved: {e}"
    return f"{first}\nsaved in {folder}: node.ir says how to see it again"


def _folder(config: pytest.Config) -> Path:
    chosen = config.getoption("--moec-repro")
    if chosen is not None:
        return Path(chosen)
    cache = getattr(config, "cache", None)
    return cache.mkdir("moec") if cache is not None else config.rootpath / ".moec-repro"
