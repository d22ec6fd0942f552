"""Random graphs through text, copies, passes and backends; and that what finds mistakes can find them."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import moec
from moec.backends.onnxruntime import backend as onnxruntime
from moec.fuzzing import check_all, check_backend, check_ir, check_random
from moec.fuzzing.graphs import KINDS, Run, of_seed, runs
from moec.fuzzing.spread import spread
from moec.fuzzing.steps import ops
from moec.ir import parse
from moec.passes import Rewrite

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@settings(QUIET, max_examples=100)
@given(runs(16), st.booleans())
def test_every_law_holds(case, portable):
    for judge, outcome in check_all(case, portable=portable, choice=len(case.graph) % 3 == 0):
        assert outcome.broken is None, f"{judge}: {outcome.broken}\n{case.graph}"


@settings(QUIET, max_examples=3)
@given(runs(5, functions=False))
def test_kernels_agree(case):
    outcome = check_backend(case.graph, case.inputs, "triton")
    assert outcome.broken is None, f"{outcome.broken}\n{case.graph}"


def test_graphs_are_varied():
    seen, dtypes, kinds, traits = Counter(), Counter(), Counter(), Counter()

    def collect(case):
        graph = case.graph
        inside = [n for g in (graph, *graph.functions.values()) for n in g.nodes]
        seen.update(n.op for n in inside)
        dtypes.update(str(r.dtype) for n in inside for r in n.results)
        kinds[case.kind] += 1
        traits["calls"] += any(n.op == "call.graph" for n in inside)
        traits["symbols"] += bool(graph.symbols)
        traits["products"] += any("*" in str(s) for n in inside for r in n.results for s in r.shape)
        traits["weights"] += bool(graph.weights)
        traits["empty"] += 0 in case.binding.values()
        traits["input returned"] += any(v.producer is None for v in graph.outputs)
        traits["shared"] += any(len(r.uses) > 1 for n in inside for r in n.results)
        traits["unused"] += any(not r.uses and not r.is_output for n in graph.nodes for r in n.results)
        traits["several results"] += any(len(n.results) > 1 for n in inside)

    for seed in range(250):
        of_seed(seed, collect)
    wanted = {o.name for o in (*ops(True), *ops(False))}
    assert len(wanted - seen.keys()) <= len(wanted) // 8, f"not met: {wanted - seen.keys()}"
    missing = {
        "f64",
        "f32",
        "f16",
        "bf16",
        "f8e4m3fn",
        "f8e5m2",
        "i64",
        "i32",
        "i16",
        "i8",
        "u8",
        "bool",
    } - dtypes.keys()
    assert len(missing) <= 1, missing
    assert set(kinds) == set(KINDS)
    assert min(traits.values()) >= 5, traits
    assert len(traits) == 9


# -- it can fail -------------------------------------------------------------------------------------


def run_of(text: str, *inputs: torch.Tensor) -> Run:
    graph = parse(text)
    graph.verify()
    return Run(graph, {}, inputs, "normal")


def test_a_lowering_that_ignores_an_attribute_is_seen(monkeypatch):
    case = run_of(
        "graph(%x: f32[4]) -> (%y: f32[4]) {\n  %0: f32[4] = math.clamp(%x) {high=0.5}\n  return %0\n}",
        torch.tensor([0.0, 1.0, 2.0, -1.0]),
    )
    assert check_backend(case.graph, case.inputs, "onnxruntime").broken is None
    monkeypatch.setitem(onnxruntime.lowerings, "math.clamp", lambda e, node: e.op("Identity", *e.operands(node)))
    broken = check_backend(case.graph, case.inputs, "onnxruntime").broken
    assert broken is not None
    assert broken.law == "onnxruntime: numbers"


def test_an_error_of_one_percent_is_seen(monkeypatch):
    case = run_of(
        "graph(%x: f16[3, 8]) -> (%y: f16[3, 8]) {\n  %0: f16[3, 8] = math.softmax(%x)\n"
        "  %1: f16[3, 8] = math.tanh(%0)\n  return %1\n}",
        torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half(),
    )
    right = onnxruntime.lowerings["math.softmax"]

    def wrong(e, node):
        return e.op("Mul", right(e, node), e.scalar(1.01, node.result.dtype))

    assert check_backend(case.graph, case.inputs, "onnxruntime").broken is None
    monkeypatch.setitem(onnxruntime.lowerings, "math.softmax", wrong)
    assert check_backend(case.graph, case.inputs, "onnxruntime").broken is not None


def test_a_printer_that_loses_digits_is_seen(monkeypatch):
    case = run_of(
        "graph(%x: f32[2]) -> (%y: f32[2]) {\n  %0: f32[2] = math.clamp(%x) {high=0.3333333333333333}\n  return %0\n}",
        torch.ones(2),
    )
    assert check_ir(case).broken is None
    from moec.ir import printer

    right = printer.print_attr
    monkeypatch.setattr(printer, "print_attr", lambda v: f"{v:.6g}" if isinstance(v, float) else right(v))
    assert check_ir(case).broken.law == "text"


@dataclass(frozen=True)
class SinIsIdentity(Rewrite):
    """sin(x) → x"""

    def pattern(self, p, x):
        return p.sin(x)

    def replace(self, b, m):
        return m.x


def test_a_wrong_rule_is_found():
    """Within the first graphs, if those of ten nodes."""

    @settings(QUIET, max_examples=800, phases=[Phase.generate], report_multiple_bugs=False)
    @given(moec.testing.graphs(10, functions=False))
    def attempt(graph):
        if "math.sin" in graph.count_ops():
            check_random(SinIsIdentity(), graph)

    with pytest.raises(AssertionError, match="pass sin_is_identity: numbers"):
        attempt()


# -- what a graph leaves open ------------------------------------------------------------------------


def chain(type: str, first: str, second: str) -> str:
    nodes = f"  %0: {type} = {first}(%x)\n  %1: {type} = {second}(%0)\n"
    return f"graph(%x: {type}) -> (%y: {type}) {{\n{nodes}  return %1\n}}"


def opened(text: str, x: torch.Tensor):
    return spread(parse(text), [x])[0]


def test_a_rounding_close_to_the_edge_is_open_and_one_far_from_it_is_not():
    text = chain("f32[1]", "math.exp", "math.round")
    edge, far = torch.tensor([0.4054651081]), torch.tensor([0.7])  # e^x = 1.5
    right, other = torch.tensor([2.0]), torch.tensor([1.0])
    assert opened(text, edge).explains(right, other, 0.0)
    assert not opened(text, far).explains(right, other, 0.0)


def test_an_integer_that_depends_on_a_near_tie_is_open():
    text = (
        "graph(%x: f32[2]) -> (%y: i64[]) {\n  %0: f32[2] = math.sin(%x)\n  %1: i64[] = math.argmax(%0)\n  return %1\n}"
    )
    tie, apart = torch.tensor([1.0, 1.0 + 1e-7]), torch.tensor([1.0, 0.5])
    assert opened(text, tie).free.all()
    assert not opened(text, apart).free.any()


def test_overflow_on_the_way_is_open():
    text = (
        "graph(%x: f16[1]) -> (%y: f16[1]) {\n  %0: f16[1] = math.mul(%x, %x)\n"
        "  %1: f16[1] = math.div(%0, %x)\n  return %1\n}"
    )
    assert opened(text, torch.tensor([1000.0]).half()).free.all()  # f32 inside: 1000
    assert not opened(text, torch.tensor([10.0]).half()).free.any()


@pytest.mark.parametrize("name", ["graphs", "check_random"])
def test_names_of_the_public_module(name):
    assert name in moec.testing.__all__
    assert callable(getattr(moec.testing, name))
    with pytest.raises(AttributeError, match="no_such"):
        moec.testing.no_such  # noqa: B018
