"""What all tests share: files `texts/*.ir` are tests too, `--accept` rewrites their expectations, and what a test
declares ends with it."""

import gc
import sys

import pytest

from moec.backends import get_backend
from moec.ir import opdef

pytest_plugins = ["moec.text_tests", "pytester"]  # the second runs the first in tests of itself


def pytest_collection_finish():
    """What imports have made stays to the end: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure():
    gc.unfreeze()


def _tables():
    """Where ops and lowerings are registered; loaded now, or what a test adds while it loads them would stay."""
    yield opdef._OPS
    yield opdef._BARE
    for name in ("onnxruntime", "triton"):
        backend = get_backend(name)
        yield from (backend.lowerings, backend.checks, backend.unsupported)


@pytest.fixture(autouse=True)
def _declarations_end_with_their_test():
    """Ops and lowerings that a test declares are gone after it: other tests go through all there are."""
    opdef.all_ops()
    before = [(table, dict(table)) for table in _tables()]
    names = {name: list(full) for name, full in opdef._BARE.items()}
    yield
    for table, old in before:
        for key in table.keys() - old.keys():
            del table[key]
        table.update(old)
    for name, full in names.items():
        opdef._BARE[name][:] = full
    registry = sys.modules.get("moec.frontend.onnx.registry")
    for versions in registry.IMPORTS.values() if registry is not None else ():
        versions[:] = [v for v in versions if v[1].__module__.startswith("moec.")]
