"""Huge pages: which memory is asked for, and that the system gives them where it has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moec.backends.onnxruntime import huge_pages as module
from moec.backends.onnxruntime.huge_pages import HUGE, grown, huge_pages
from moec.ir import ArgumentValueError

from .conftest import compiled, graph_of, typed

MIB = 1 << 20


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [(0, 4 * MIB)], [(0, 4 * MIB)]),
        ([], [(MIB, 5 * MIB)], [(2 * MIB, 4 * MIB)]),  # whole pages only
        ([(0, 4 * MIB)], [(0, 4 * MIB)], []),
        ([(0, 4 * MIB)], [(0, 8 * MIB)], [(4 * MIB, 8 * MIB)]),
        ([(0, 3 * MIB)], [(0, 8 * MIB)], [(2 * MIB, 8 * MIB)]),  # the page that is half new too
        ([(2 * MIB, 4 * MIB)], [(0, 8 * MIB)], [(0, 2 * MIB), (4 * MIB, 8 * MIB)]),
        ([(3 * MIB, 4 * MIB)], [(0, 8 * MIB)], [(0, 4 * MIB), (4 * MIB, 8 * MIB)]),
        ([(0, 2 * MIB), (6 * MIB, 8 * MIB)], [(0, MIB), (10 * MIB, 12 * MIB)], [(10 * MIB, 12 * MIB)]),
        ([], [(0, MIB)], []),
    ],
)
def test_what_has_grown(before, after, expected):
    assert grown(before, after) == expected


def _huge_bytes() -> int:
    path = Path("/proc/self/smaps_rollup")
    found = re.search(r"AnonHugePages:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found.group(1)) * 1024 if found else 0


def _given() -> bool:
    """Whether this system gives huge pages to who asks."""
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return enabled.exists() and "[never]" not in enabled.read_text()


@pytest.mark.parametrize("wanted", [True, False])
def test_memory_is_moved_and_keeps_what_it_holds(wanted: bool):
    before = _huge_bytes()
    with huge_pages(wanted) as threads:
        held = torch.arange(64 * MIB // 8)
    assert len(threads) == (wanted and _MAPS_THERE)
    for thread in threads:
        thread.join()
    assert torch.equal(held, torch.arange(len(held)))
    if wanted and _given():
        assert _huge_bytes() - before >= 16 * MIB  # of 64: others may use the memory of the machine


_MAPS_THERE = Path("/proc/self/maps").exists()


def test_little_memory_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    with huge_pages() as threads:
        held = torch.zeros(HUGE // 4)
    assert held.numel()
    assert not threads
    monkeypatch.setattr(module, "_MAPS", Path("/nowhere"))
    with huge_pages() as threads:
        held = torch.zeros(64 * MIB)
    assert not threads


def test_an_error_within_passes():
    with pytest.raises(KeyError), huge_pages():
        raise KeyError


def test_the_option():
    graph = graph_of({"x": typed("f32", 2)}, lambda b, x: b.neg(x))
    assert compiled(graph, huge_pages=False).run([torch.ones(2)])[0].tolist() == [-1, -1]
    with pytest.raises(ArgumentValueError, match="option huge_pages=1 is not True or False"):
        compiled(graph, huge_pages=1)
