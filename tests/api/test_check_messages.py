"""What check_pass and bisect see on large numbers, and what they say: the application, where it is, and a diff of what
it changed and no more."""

from __future__ import annotations

import warnings

import pytest
import torch

import moec
from moec.graph_text import graph_diff
from moec.ir import parse
from moec.ir.extremes import first_infinite, with_large_weights
from moec.passes import Pass, Pipeline, Rewrite
from moec.testing import check_pass

SOFTMAX = "graph(%x: f32[T, 5]) -> (%y: f32[T, 5]) {\n  %0: f32[T, 5] = math.softmax(%x)\n  return %0\n}\n"
BEHIND_A_NORM = """
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {
  weight @w: f32[8]
  weight @up: f32[8, 8]
  %0: f32[T, 8] = norm.rms(%x, @w)
  %1: f32[T, 8] = linear.linear(%0, @up, _)
  %2: f32[T, 8] = math.softmax(%1)
  return %2
}
"""


class Unstable(Rewrite):
    """softmax(x) → exp(x) / Σ exp(x): right until exp overflows"""

    def pattern(self, p, x):
        return p.softmax(x, axis=p.attr("axis"))

    def replace(self, b, m):
        e = b.exp(m.x)
        return b.div(e, b.sum(e, axes=[m.axis], keepdim=True))


class Stable(Rewrite):
    """softmax(x) → exp(x − max x) / Σ exp(x − max x)"""

    def pattern(self, p, x):
        return p.softmax(x, axis=p.attr("axis"))

    def replace(self, b, m):
        e = b.exp(b.sub(m.x, b.amax(m.x, axes=[m.axis], keepdim=True)))
        return b.div(e, b.sum(e, axes=[m.axis], keepdim=True))


class Unstabilise(Rewrite):
    """exp(x − max x) → exp(x): brings in no op"""

    def pattern(self, p, x):
        return p.exp(p.sub(x, p.amax(x, axes=p.attr("axes"), keepdim=True)))

    def replace(self, b, m):
        return b.exp(m.x)


def test_an_overflow_for_large_inputs_is_seen():
    with pytest.raises(AssertionError, match=r"expected .*, got nan; it is not finite .*large inputs"):
        check_pass(Unstable(), SOFTMAX)
    stable = check_pass(Stable(), SOFTMAX)
    with pytest.raises(AssertionError, match="changes the meaning"):
        check_pass(Unstabilise(), stable)


def test_an_overflow_behind_a_norm_is_seen_with_large_weights():
    with pytest.raises(AssertionError, match=r"(?s)where weights are large.*got nan.*at application 1 of 1"):
        check_pass(Unstable(), BEHIND_A_NORM)
    check_pass(Stable(), BEHIND_A_NORM)


@pytest.mark.parametrize("graph", [SOFTMAX, BEHIND_A_NORM])
def test_bisect_sees_it_too(graph):
    culprit = moec.bisect(parse(graph), passes=Pipeline((Stable(max=0), Unstable())), seconds=5)
    assert culprit.name == "unstable"
    assert "not finite where the original is" in str(culprit)
    assert moec.bisect(parse(graph), passes=Pipeline((Stable(),)), seconds=5).kind == "none"


def test_what_is_not_finite_in_the_original_is_not_compared():
    exponential = SOFTMAX.replace("math.softmax", "math.exp")

    class Rebuilt(Rewrite):
        def pattern(self, p, x):
            return p.exp(x)

        def replace(self, b, m):
            return b.reciprocal(b.exp(b.neg(m.x)))

    assert len(check_pass(Rebuilt(max=1), exponential)) == 3


def test_first_infinite():
    inf, nan = float("inf"), float("nan")
    a = [torch.tensor([1, 2]), torch.tensor([1.0, inf, 2.0, 3.0])]
    assert first_infinite(a, [a[0] + 1, torch.tensor([9.0, nan, 9.0, 9.0])]) is None  # only what is not finite counts
    assert first_infinite(a, [a[0], torch.tensor([9.0, nan, 9.0, -inf])]) == (1, (3,), 3.0, -inf)


def test_large_weights():
    graph = parse(BEHIND_A_NORM)
    graph.bind_weights({"w": torch.ones(8), "up": torch.full((8, 8), 2.0)})
    large = with_large_weights(graph)
    assert large.weights["up"].weight.load().unique().tolist() == [20000.0]
    assert large.weights["w"].weight is graph.weights["w"].weight
    assert graph.weights["up"].weight.load().unique().tolist() == [2.0]


# -- messages -----------------------------------------------------------------------------------------

COUNT = 40


def chain(op_at: dict[int, str]) -> str:
    """A chain of silus, with other ops in places."""

    def row(i: int) -> str:
        operand = f"%{i - 1}" if i else "%x"
        return f'  %{i}: f32[T] = math.{op_at.get(i, "silu")}({operand}) loc("layers.{i}" "net.py":{i + 1})'

    rows = [row(i) for i in range(COUNT)]
    return "\n".join(["graph(%x: f32[T]) -> (%y: f32[T]) {", *rows, f"  return %{COUNT - 1}", "}"])


class DropsNegation(Rewrite):
    def pattern(self, p, x):
        return p.tanh(p.neg(x))

    def replace(self, b, m):
        return b.tanh(m.x)


def test_a_node_less_does_not_change_every_line():
    before = parse(chain({5: "neg", 6: "tanh"}))
    with pytest.raises(AssertionError) as e:
        check_pass(DropsNegation(), before)
    changed = [row for row in str(e.value).splitlines() if row[:1] in "+-" and row[:3] not in ("---", "+++")]
    assert changed == [
        "-  %5: f32[T] = math.neg(%4)",
        "-  %6: f32[T] = math.tanh(%5)",
        "+  %6: f32[T] = math.tanh(%4)",
    ], str(e.value)
    assert graph_diff(before, before) == ""


def test_the_application_and_its_place_are_named():
    with pytest.raises(AssertionError, match=r"application 1 of 2, layers, layers.5 net.py:6 and 1 more\n---") as e:
        check_pass(DropsNegation(), parse(chain({5: "neg", 6: "tanh", 25: "neg", 26: "tanh"})))
    assert "math.neg(%24)" not in str(e.value)  # the second application


def test_weights_and_outputs_are_in_the_diff():
    before = parse(BEHIND_A_NORM)
    after = parse(BEHIND_A_NORM.replace("(%y:", "(%z:").replace("weight @up", "weight @more: f32[3]\n  weight @up"))
    rows = graph_diff(before, after).splitlines()
    assert "+  weight @more: f32[3]" in rows
    assert "+  return z = %2: f32[T, 8]" in rows


class Nothing(Pass):
    def run(self, graph):
        return graph.clone()


def test_a_pass_that_changes_nothing_warns():
    with pytest.warns(UserWarning, match=r"pass nothing \(.*messages.py:\d+\) changes nothing in this graph"):
        check_pass(Nothing(), SOFTMAX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pass(Stable(), SOFTMAX)
    culprit = moec.bisect(parse(SOFTMAX), passes=[Nothing()])
    assert not culprit
    assert "note: nothing (" in str(culprit)
    assert "changes nothing here" in str(culprit)
