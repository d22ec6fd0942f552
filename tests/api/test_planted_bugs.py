"""Every planted bug is found where it was planted, and nowhere else."""

from __future__ import annotations

import pytest

from .planted import BOTH, compare, same, subject
from .planted_bugs import BUGS

CASES = [pytest.param(bug, mode, id=f"{bug.name}-{mode}") for bug in BUGS for mode in bug.modes]
# the executable that lowers nothing is the reference but for its bug
HEALTHY = sorted(
    {(bug.subject, bug.inputs, mode, bug.backend) for bug in BUGS for mode in bug.modes if bug.backend != "reference"}
)


def test_there_are_enough():
    assert len(BUGS) >= 30
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {mode for bug in BUGS for mode in bug.modes} == set(BOTH)


@pytest.mark.parametrize(("bug", "mode"), CASES)
def test_the_planted_node_is_named(bug, mode):
    graph, inputs = subject(bug.subject).graph, subject(bug.subject).inputs[bug.inputs]
    planted = bug.planted(graph)
    assert planted
    comparison = compare(graph, inputs, bug.plant(), mode)
    found = comparison.first_divergence
    assert found is not None, str(comparison)
    assert same(found.node, planted[0]), f"{found} instead of {planted[0]}"
    assert found.location == planted[0].location.describe()
    assert not found.error <= found.tolerance
    for n in comparison.nodes:
        assert n.ok or any(same(n.node, p) for p in planted), f"{n.node} accused: {n.difference}"
    assert not comparison.ok


@pytest.mark.parametrize(("name", "inputs", "mode", "backend"), HEALTHY)
def test_the_healthy_backend_passes(name, inputs, mode, backend):
    comparison = compare(subject(name).graph, subject(name).inputs[inputs], backend, mode)
    assert comparison.ok, str(comparison)
    assert comparison.first_divergence is None
