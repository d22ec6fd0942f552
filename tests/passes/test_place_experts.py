"""place_experts: optimality on tiny cases, properties, bounds, drift, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import ArgumentTypeError, ArgumentValueError, Mesh, Placement
from moec.passes.placement import place_experts
from moec.passes.placement.align import align
from moec.passes.placement.counts import lower_bound, spare_on_coldest, water_fill

from .placement_cases import balance, every_placement, gpu_loads, lognormal, zipf


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Mesh]:
    experts = draw(st.integers(1, 12))
    gpus = draw(st.integers(1, 5))
    slots = draw(st.lists(st.integers(0, 5), min_size=gpus, max_size=gpus))
    slots[0] += max(0, experts - sum(slots))
    loads = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.integers(0, 5).map(float))
    load = draw(st.lists(st.lists(loads, min_size=experts, max_size=experts), min_size=1, max_size=3))
    return np.array(load), Mesh(1, gpus, tuple(slots))


@given(problems(), st.sampled_from(["prefill", "decode"]))
@settings(max_examples=80, deadline=None)
def test_every_result_is_a_placement_with_the_balance_it_states(problem, phase):
    load, mesh = problem
    p = place_experts(load, mesh, phase=phase)
    assert p.physical_to_logical.shape == (len(load), mesh.num_slots)
    for layer, row in enumerate(p.physical_to_logical):
        assert set(row.tolist()) == set(range(load.shape[1]))
        assert p.balance[layer] == pytest.approx(balance(load[layer], row, mesh), rel=1e-9)
        shares = np.bincount(row, weights=p.fractions[layer])
        np.testing.assert_allclose(shares, 1.0)
    assert (p.lower_bound <= p.balance * (1 + 1e-9)).all()
    assert (p.lower_bound >= 1).all()
    again = place_experts(load.copy(), mesh, phase=phase)
    np.testing.assert_array_equal(p.physical_to_logical, again.physical_to_logical)


@given(problems())
@settings(max_examples=40, deadline=None)
def test_relabelling_and_rescaling_leave_the_balance(problem):
    load, mesh = problem
    load = load + np.linspace(0.1, 0.2, load.shape[1])  # no ties: which of two equal experts goes first may matter
    order = np.random.default_rng(0).permutation(load.shape[1])
    p = place_experts(load, mesh)
    np.testing.assert_allclose(place_experts(load[:, order], mesh).balance, p.balance, rtol=1e-6)
    np.testing.assert_array_equal(place_experts(load * 8, mesh).physical_to_logical, p.physical_to_logical)


@pytest.mark.parametrize(
    ("experts", "slots"),
    [(4, (2, 2)), (3, (2, 2)), (5, (3, 3)), (6, (3, 3)), (4, (2, 2, 2)), (5, (1, 3, 2)), (3, (4,)), (4, (1, 1, 1, 2))],
)
def test_tiny_cases_against_every_placement(experts, slots):
    mesh = Mesh(1, len(slots), slots)
    load = np.concatenate([lognormal(1.0, 6, experts), zipf(1.2, 2, experts), np.ones((1, experts))])
    p = place_experts(load, mesh, tolerance=0.0)
    optimal = 0
    for layer, row in enumerate(load):
        best = min(balance(row, candidate, mesh) for candidate in every_placement(experts, mesh))
        assert p.lower_bound[layer] <= best * (1 + 1e-9)
        assert p.balance[layer] <= best * 1.15
        optimal += p.balance[layer] <= best * (1 + 1e-9)
    assert optimal >= 0.7 * len(load)


def test_water_filling_is_optimal():
    r = np.random.default_rng(1)
    for _ in range(40):
        load, slots = r.lognormal(0, 1, 4), int(r.integers(4, 9))
        best = min((load / np.array(c)).max() for c in np.ndindex(6, 6, 6, 6) if min(c) > 0 and sum(c) == slots)
        count = water_fill(load, slots, num_gpus=9)
        assert count.sum() == slots
        assert (load / count).max() == pytest.approx(best)


def test_water_filling_stops_at_one_replica_per_gpu_while_it_can():
    assert water_fill(np.array([100.0, 1.0, 1.0]), 7, num_gpus=3).tolist() == [3, 2, 2]
    assert water_fill(np.array([100.0, 1.0]), 9, num_gpus=2).sum() == 9
    assert water_fill(np.zeros(3), 5, num_gpus=4).sum() == 5


def test_lower_bound_by_hand():
    # one expert with all the load on two GPUs: half each
    assert lower_bound(np.array([1.0, 0, 0, 0]), np.array([3, 3])) == 1.0
    # no spare slot: the hot expert alone makes 4/2 of the mean, and 1 comes with it
    assert lower_bound(np.array([4.0, 1, 1, 2]), np.array([2, 2])) == pytest.approx(5 / 4)
    # three equal experts on two GPUs: some GPU has two
    assert lower_bound(np.ones(3), np.array([2, 1])) == pytest.approx(2 / 1.5)
    assert lower_bound(np.zeros(4), np.array([2, 2])) == 1.0


# (layers, experts, GPUs, slots per GPU, load) → worst and median balance that must hold
FIGURES = [
    (lognormal(1.0, 6, 256), (9,) * 32, 1.011, 1.01),
    (lognormal(1.0, 6, 256), (5,) * 32 + (4,) * 32, 1.012, 1.0102),
    (lognormal(1.0, 6, 256), (3,) * 32 + (2,) * 112, 1.11, 1.06),
    (zipf(1.2, 2, 256), (5,) * 64, 1.06, 1.055),
    (zipf(0.3, 2, 256), (8,) * 32, 1.101, 1.101),
]


@pytest.mark.parametrize(("load", "slots", "worst", "median"), FIGURES)
def test_balance_at_scale(load, slots, worst, median):
    p = place_experts(load, Mesh(1, len(slots), slots))
    assert p.balance.max() <= worst
    assert np.median(p.balance) <= median


def test_replicas_of_one_expert_are_on_different_gpus():
    load, mesh = zipf(1.0, 4, 32), Mesh(2, 4, 6)
    for row in place_experts(load, mesh).physical_to_logical:
        for gpu in row.reshape(8, 6):
            assert len(set(gpu.tolist())) == 6


def test_current_stays_when_it_is_good():
    load, mesh = lognormal(1.0, 3, 64), Mesh(1, 8, 9)
    p = place_experts(load, mesh)
    q = place_experts(load * 3, mesh, current=p)
    np.testing.assert_array_equal(q.physical_to_logical, p.physical_to_logical)
    assert q.moves.tolist() == [0, 0, 0]


def test_moves_after_drift():
    r = np.random.default_rng(3)
    load, mesh = lognormal(1.0, 4, 256), Mesh(4, 8, 9)
    p = place_experts(load, mesh)
    drifted = load * r.lognormal(0, 0.2, load.shape)
    stale = [balance(x, row, mesh) for x, row in zip(drifted, p.physical_to_logical, strict=True)]
    previous = np.array(stale)
    for budget, worst in ((0, np.inf), (17, 1.06), (40, 1.015), (None, 1.0101)):
        q = place_experts(drifted, mesh, current=p, max_moves=budget)
        changed = (q.physical_to_logical != p.physical_to_logical).sum(axis=1)
        np.testing.assert_array_equal(q.moves, changed)
        assert budget is None or changed.max() <= budget
        assert (q.balance <= previous + 1e-9).all()
        assert q.balance.max() <= worst
        previous = q.balance
    assert q.moves.max() < 60  # a fresh placement would change most of the 288 slots


@given(problems(), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_budget_is_kept_and_nothing_gets_worse(problem, budget):
    load, mesh = problem
    p = place_experts(load, mesh)
    shifted = np.roll(load, 1, axis=1) + 0.1
    q = place_experts(shifted, mesh, current=p, max_moves=budget)
    assert (q.moves <= budget).all()
    for layer, row in enumerate(q.physical_to_logical):
        assert set(row.tolist()) == set(range(load.shape[1]))
        assert q.balance[layer] <= balance(shifted[layer], p.physical_to_logical[layer], mesh) * (1 + 1e-9)


def test_a_stuck_start_is_replaced():
    """All replicas of the wrong expert: small steps or a fresh start must get to the bound."""
    mesh = Mesh(1, 4, 2)
    current = Placement(mesh, [[0, 1, 0, 2, 0, 3, 0, 4]])
    load = np.array([[1.0, 1, 1, 1, 12]])
    q = place_experts(load, mesh, current=current)
    assert q.balance[0] <= place_experts(load, mesh).balance[0] * 1.011


def test_a_fresh_start_is_laid_over_the_current_one():
    slots = np.array([3, 3, 2])
    current = np.array([4, 0, 1, 2, 5, 3, 1, 0])
    # the same GPUs in another order, experts in another order, and 5 instead of 4
    placed = [[5, 2, 3], [1, 5, 0], [0, 1]]
    assert align(placed, slots, current, 6).tolist() == [5, 0, 1, 2, 5, 3, 1, 0]
    # a GPU of another size cannot take them
    assert align([[0, 1], [3, 2, 2]], np.array([2, 3]), np.array([3, 2, 1, 0, 0]), 4).tolist() == [0, 1, 2, 2, 3]
    # no common expert: any order
    assert sorted(align([[0, 1], [2, 3]], np.array([2, 2]), np.array([0, 0, 1, 1]), 4).tolist()) == [0, 1, 2, 3]


def test_decoding_copies_the_idlest_experts():
    load, mesh = np.array([[8.0, 4, 2, 1]]), Mesh(1, 2, 3)
    busy = np.bincount(place_experts(load, mesh).physical_to_logical[0])
    idle = np.bincount(place_experts(load, mesh, phase="decode").physical_to_logical[0])
    assert busy[0] >= 2
    assert busy[3] == 1
    assert idle.tolist() == [1, 1, 2, 2]
    assert spare_on_coldest(np.array([3.0, 1, 2]), 12, 2).tolist() == [4, 4, 4]


def test_decoding_keeps_replica_counts_of_the_current_placement():
    mesh = Mesh(1, 4, 3)
    load = lognormal(1.0, 1, 9)
    p = place_experts(load, mesh, phase="decode")
    q = place_experts(load[:, ::-1], mesh, current=p, phase="decode")
    np.testing.assert_array_equal(np.bincount(q.physical_to_logical[0]), np.bincount(p.physical_to_logical[0]))
    assert q.moves[0] > 0


def test_coactivated_experts_share_a_node():
    mesh = Mesh(nodes=2, gpus_per_node=2, slots_per_gpu=2)
    load = np.ones((1, 8))
    even = np.arange(8) % 2 == 0
    pairs = (even[:, None] == even[None, :]).astype(float)[None]
    p = place_experts(load, mesh, coactivation=pairs)
    assert p.balance[0] == 1.0
    nodes = p.physical_to_logical[0].reshape(2, 4) % 2
    assert all(len(set(node.tolist())) == 1 for node in nodes)
    plain = place_experts(load, mesh).physical_to_logical[0].reshape(2, 4) % 2
    assert any(len(set(node.tolist())) > 1 for node in plain)


@pytest.mark.parametrize(
    "convert", [torch.tensor, np.array, lambda x: x, lambda x: torch.tensor(x).bfloat16().T.contiguous().T]
)
def test_kinds_of_load(convert):
    load = [[4.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    p = place_experts(convert(load), Mesh(1, 2, 2))
    assert gpu_loads(np.array(load[0]), p.physical_to_logical[0], p.mesh).tolist() in ([5, 3], [3, 5])
    assert p.balance.tolist() == [1.25, 1.0]


def test_extreme_loads():
    p = place_experts([[1e308, 1e308, 1e308], [1e-320, 0, 0]], Mesh(1, 3, 1))
    assert p.balance[0] == pytest.approx(1.0)
    assert p.balance[1] == pytest.approx(3.0)


def test_gpus_without_slots_carry_nothing():
    p = place_experts(np.ones((1, 4)), Mesh(1, 3, (2, 0, 2)))
    assert p.balance[0] == 1.0
    assert p.physical_to_logical.shape == (1, 4)


LOAD = np.ones((2, 4))
MESH = Mesh(1, 2, 2)
OTHER = Placement(Mesh(1, 2, 3), [[0, 1, 2, 3, 0, 1]] * 2)
FEWER = Placement(MESH, [[0, 1, 2, 0]] * 2)


@pytest.mark.parametrize(
    ("load", "mesh", "options", "words"),
    [
        ([[1.0, np.nan, 1, 1]], MESH, {}, ["load[0, 1]", "nan"]),
        ([[1.0, 1, -2, 1]], MESH, {}, ["load[0, 2]", "-2"]),
        ([[1.0, 1, np.inf, 1]], MESH, {}, ["inf"]),
        ([1.0, 2.0], MESH, {}, ["shape [2]"]),
        (np.ones((0, 4)), MESH, {}, ["shape [0, 4]"]),
        (np.ones((1, 5)), MESH, {}, ["4 slots", "5 experts", "at least 3"]),
        (LOAD, MESH, {"max_moves": 3}, ["current"]),
        (LOAD, MESH, {"current": OTHER}, ["current is for"]),
        (LOAD, MESH, {"current": FEWER}, ["3 experts", "of 4"]),
        (LOAD, MESH, {"current": Placement(MESH, [[0, 1, 2, 3]]), "max_moves": 1}, ["1 layers", "has 2"]),
        (LOAD, MESH, {"current": Placement(MESH, [[0, 1, 2, 3]] * 2), "max_moves": -1}, ["max_moves", "-1"]),
        (LOAD, MESH, {"phase": "train"}, ["phase 'train'"]),
        (LOAD, MESH, {"tolerance": -0.1}, ["tolerance"]),
        (LOAD, MESH, {"tolerance": float("nan")}, ["tolerance"]),
        (LOAD, MESH, {"coactivation": np.ones((2, 4, 3))}, ["coactivation has shape"]),
    ],
)
def test_errors_name_the_problem(load, mesh, options, words):
    with pytest.raises(ArgumentValueError) as e:
        place_experts(load, mesh, **options)
    assert all(w in str(e.value) for w in words), str(e.value)


@pytest.mark.parametrize(
    ("load", "mesh", "options"),
    [([["a", "b"]], MESH, {}), ([[1.0], [1.0, 2.0]], MESH, {}), (LOAD, 8, {}), (LOAD, MESH, {"current": [[0, 1]]})],
)
def test_wrong_kinds(load, mesh, options):
    with pytest.raises(ArgumentTypeError):
        place_experts(load, mesh, **options)


def test_placement_round_trip_and_checks():
    p = place_experts(zipf(1.0, 2, 6), Mesh(2, 2, (2, 2, 3, 1)))
    q = Placement.from_dict(p.to_dict())
    for name in ("physical_to_logical", "balance", "lower_bound", "moves", "fractions"):
        np.testing.assert_array_equal(getattr(p, name), getattr(q, name))
    assert q.mesh.slots == p.mesh.slots
    with pytest.raises(ValueError, match="read-only"):
        p.physical_to_logical[0, 0] = 1
    with pytest.raises(ArgumentValueError, match=r"experts \[1\] have no slot"):
        Placement(MESH, [[0, 0, 2, 3]])
    with pytest.raises(ArgumentValueError, match="shape"):
        Placement(MESH, [[0, 1, 2]])
    with pytest.raises(ArgumentValueError, match="not an array of numbers"):
        Placement(MESH, [[0.0, 1.0, 2.0, 3.0]])
    with pytest.raises(ArgumentValueError, match="not a placement"):
        Placement.from_dict({"mesh": {}})


def test_tables_list_every_replica():
    p = Placement(Mesh(1, 2, 3), [[1, 0, 1, 2, 1, 0]])
    table, count = p.tables(0)
    assert count.tolist() == [2, 3, 1]
    assert table.tolist() == [[1, 5, 1], [0, 2, 4], [3, 3, 3]]
