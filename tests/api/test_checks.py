"""moec.testing's checks of rules: each way in which a rule can be wrong is an AssertionError that names it."""

import re
from dataclasses import dataclass

import pytest
import torch

from moec.ir import DType, Graph, Operand, TensorType, Weight, op, parse
from moec.passes import DeadCode, FuseSwiGLU, Pass, Rewrite, RuleSet
from moec.testing import check_pass, check_rewrite, check_unchanged

BEFORE = """
graph(%gate: f32[T, 8], %up: f32[T, 8]) -> (%y: f32[T, 8]) {
  %0: f32[T, 8] = math.silu(%gate)
  %1: f32[T, 8] = math.mul(%0, %up)
  return %1
}
"""
AFTER = """
graph(%gate: f32[T, 8], %up: f32[T, 8]) -> (%y: f32[T, 8]) {
  %0: f32[T, 8] = math.swiglu(%gate, %up)
  return %0
}
"""
THIS = re.escape(__file__)


@dataclass(frozen=True)
class Doubled(Rewrite):
    """add(x, x) → 2x (times `factor`, for the tests)"""

    factor: float = 2.0

    def pattern(self, p, x):
        return p.add(x, x)

    def replace(self, b, m):
        return b.mul(m.x, self.factor)


SUM = """
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {
  %0: f32[T, 8] = math.add(%x, %x)
  return %0
}
"""


def test_a_right_rule():
    result = check_rewrite(FuseSwiGLU(), BEFORE, AFTER)
    assert [n.op for n in result.nodes] == ["math.swiglu"]
    check_pass(FuseSwiGLU(), BEFORE)
    check_unchanged(FuseSwiGLU(), AFTER)
    check_rewrite(RuleSet((FuseSwiGLU(),)), parse(BEFORE), parse(AFTER))  # a pass, and graphs


def test_order_locations_and_unused_weights_do_not_count():
    before = """
graph(%x: f32[T]) -> (%y: f32[T], %z: f32[T]) {
  weight @unused: f32[3]
  %a: f32[T] = math.exp(%x) loc("m" "f.py":3) origin("a")
  %b: f32[T] = math.add(%x, %x)
  return %a, %b
}
"""
    after = """
graph(%x: f32[T]) -> (%y: f32[T], %z: f32[T]) {
  %c: f32[] = tensor.constant() {value=[2.0], type=f32[]}
  %b: f32[T] = math.mul(%x, %c)
  %a: f32[T] = math.exp(%x)
  return %a, %b
}
"""
    check_rewrite(Doubled(), before, after)


def test_another_result_than_expected():
    with pytest.raises(AssertionError) as e:
        check_rewrite(FuseSwiGLU(), BEFORE, AFTER.replace("%gate, %up)\n", "%up, %gate)\n"))
    assert re.search(r"rule fuse_swiglu \(.*fuse_mlp\.py:\d+\) gives another graph than expected", str(e.value))
    assert "-  %0: f32[T, 8] = math.swiglu(%up, %gate)\n+  %0: f32[T, 8] = math.swiglu(%gate, %up)" in str(e.value)


def test_a_rule_that_does_not_fire_is_explained():
    with pytest.raises(
        AssertionError,
        match=r"(?s)fuse_swiglu .* changes nothing\n.*expected math.silu",
    ) as e:
        check_rewrite(FuseSwiGLU(), BEFORE.replace("silu", "sigmoid"), AFTER)
    assert "math.sigmoid" in str(e.value)


def test_before_and_after_must_differ():
    with pytest.raises(AssertionError, match="use check_unchanged"):
        check_rewrite(FuseSwiGLU(), AFTER, AFTER)


@pytest.mark.parametrize("factor", [2.02, 1.98, -2.0, float("nan"), float("inf")])
def test_a_perturbed_constant(factor):
    with pytest.raises(AssertionError, match=rf"rule doubled \({THIS}:\d+\) changes the meaning: output 'y'"):
        check_pass(Doubled(factor), SUM)


def test_equal_text_with_another_meaning_is_seen():
    """The expected text agrees with the rule: both are wrong."""
    wrong = SUM.replace("%0: f32[T, 8] = math.add(%x, %x)", "%0: f32[T, 8] = math.mul(%x, %1)").replace(
        "{\n", "{\n  %1: f32[] = tensor.constant() {value=[2.02], type=f32[]}\n", 1
    )
    with pytest.raises(AssertionError, match="changes the meaning"):
        check_rewrite(Doubled(2.02), SUM, wrong)


def test_unchanged_and_why():
    check_unchanged(Doubled(), BEFORE, because="there is no math.add")
    with pytest.raises(
        AssertionError, match=r"leaves the graph alone, but not because of 'bias'; it says\n.*no math.add"
    ):
        check_unchanged(Doubled(), BEFORE, because="bias")
    with pytest.raises(AssertionError, match=r"rule doubled \(.*\) changes the graph \(1 × doubled\)\n---"):
        check_unchanged(Doubled(), SUM)


@dataclass(frozen=True)
class Picky(Doubled):
    def when(self, m):
        return m.no("x is too wide", at=m.x) if m.x.shape[-1] == 8 else None


def test_because_is_what_when_says():
    check_unchanged(Picky(), SUM, because="x is too wide")
    check_rewrite(Picky(), SUM.replace("8", "9"), parse(SUM.replace("8", "9")) and _doubled(9))


def _doubled(n):
    return f"""
graph(%x: f32[T, {n}]) -> (%y: f32[T, {n}]) {{
  %0: f32[] = tensor.constant() {{value=[2.0], type=f32[]}}
  %1: f32[T, {n}] = math.mul(%x, %0)
  return %1
}}
"""


@dataclass(frozen=True)
class Mutates(Pass):
    what: str = "node"

    def run(self, graph: Graph) -> Graph:
        if self.what == "node":
            for node in list(graph.nodes):
                node.attrs.update({k: -1 for k in node.attrs if k == "axis"})
        elif self.what == "data":
            graph.weights["w"].weight.load().mul_(2)
        elif self.what == "output name":
            graph = graph.clone()
            graph.output_names[0] = "other"
        elif self.what == "input name":
            graph = graph.clone()
            graph.inputs[0].name = "other"
        elif self.what == "dtype":
            graph = graph.clone()
            wide = graph.create("math.cast", [graph.outputs[0]], {"dtype": DType.F64}).result
            graph.set_output(0, wide)
        elif self.what == "invalid":
            graph = graph.clone()
            next(graph.nodes).results[0].type = graph.inputs[0].type.with_dtype("f16")
        elif self.what == "grows":
            graph = graph.clone()
            graph.set_output(0, graph.create("math.neg", [graph.create("math.neg", [graph.outputs[0]]).result]).result)
        elif self.what == "none":
            return None  # type: ignore[return-value]  # what the check must name
        elif self.what == "raises":
            raise ValueError("bad luck")
        return graph


SOFTMAX = """
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {
  weight @w: f32[8]
  %0: f32[T, 8] = math.softmax(%x) {axis=1}
  %1: f32[T, 8] = math.mul(%0, @w)
  return %1
}
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("node", "changed its input graph"),
        ("data", "changes the data of weight 'w' in place"),
        ("output name", "outputs are (other: f32[T, 8]), expected (y: f32[T, 8])"),
        ("input name", "inputs are (other: f32[T, 8]), expected (x: f32[T, 8])"),
        ("dtype", "outputs are (y: f64[T, 8]), expected (y: f32[T, 8])"),
        ("invalid", "has type (f16[T, 8]), its rule gives (f32[T, 8])"),
        ("grows", "changes its own result when run again"),
        ("none", "returned NoneType, not a Graph"),
        ("raises", "bad luck"),
    ],
)
def test_what_a_pass_must_not_do(what, message):
    with pytest.raises(AssertionError) as e:
        check_pass(Mutates(what), SOFTMAX)
    assert message in str(e.value)
    assert re.search(rf"pass mutates \({THIS}:\d+\)", str(e.value))


def test_what_is_no_rule_or_graph():
    with pytest.raises(AssertionError, match=r"give an instance, Doubled\(\)"):
        check_pass(Doubled, SUM)
    with pytest.raises(AssertionError, match="is not a Pass"):
        check_unchanged("doubled", SUM)
    with pytest.raises(
        AssertionError, match=r"the graph is not a valid graph\n.*line 3, column 3: unknown op 'math.ad'"
    ):
        check_pass(Doubled(), SUM.replace("add", "ad"))
    with pytest.raises(AssertionError, match=r"(?s)after is not a valid graph.*hint"):
        check_rewrite(FuseSwiGLU(), BEFORE, AFTER.replace("swiglu", "swigl"))


def test_nothing_to_compare():
    always_nan = """
graph(%x: f32[T]) -> (%y: f32[T]) {
  %0: f32[T] = math.add(%x, %x)
  %1: f32[T] = math.abs(%0)
  %2: f32[T] = math.neg(%1)
  %3: f32[T] = math.sqrt(%2)
  return %3
}
"""
    with pytest.raises(AssertionError, match=r"output 'y' of the graph is mostly NaN or empty"):
        check_pass(Doubled(), always_nan)


def test_a_max_of_applications_is_no_fixed_point():
    twice = """
graph(%x: f32[T]) -> (%y: f32[T]) {
  %0: f32[T] = math.add(%x, %x)
  %1: f32[T] = math.add(%0, %0)
  return %1
}
"""
    check_pass(Doubled(max=1), twice)
    check_pass(Doubled(), twice)


EXPERTS = """
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {
  weight @router: f32[5, 8]
  weight @gate_up: f32[5, 6, 8]
  weight @down: f32[5, 8, 3]
  %0: f32[T, 5] = linear.linear(%x, @router)
  %1: f32[T, 2], %2: i64[T, 2] = moe.route(%0) {k=2}
  %3: f32[T, 8] = moe.experts(%x, %1, %2, @gate_up, @down)
  return %3
}
"""


@dataclass(frozen=True)
class Experts(Rewrite):
    """Moves the experts' weights to a new name, with a mistake."""

    mistake: str = ""

    def pattern(self, p, x, logits, gate_up, down):
        weights, experts = p.route(logits, k=2)
        return p.op("moe.experts", [x, weights, experts, gate_up, down])

    def when(self, m):
        return m.no("done") if m.gate_up.weight is None or m.gate_up.weight.name == "moved" else None

    def replace(self, b, m):
        old = m.gate_up.weight

        def compute():
            data = old.load().clone()
            if self.mistake == "one expert":
                data[3] *= 1.01
            return data.roll(1, 0) if self.mistake == "order of experts" else data

        moved = b.weight("moved", compute, old.type)
        logits = m.logits
        if self.mistake == "ties":
            weights, experts = b.route(b.gather(logits, b.const([4, 3, 2, 1, 0], "i64", (5,)), axis=1), k=2)
            experts = b.sub(4, experts)
        else:
            weights, experts = b.route(logits, k=2)
        if self.mistake == "order of weights":
            weights = b.gather(weights, b.const([1, 0], "i64", (2,)), axis=1)
        return b.op("moe.experts", [m.x, weights, experts, moved, m.down])


@pytest.mark.parametrize("mistake", ["one expert", "order of experts", "order of weights", "ties"])
def test_mistakes_with_experts(mistake):
    with pytest.raises(AssertionError, match=r"rule experts \(.*\) changes the meaning") as e:
        check_pass(Experts(mistake), EXPERTS)
    assert mistake != "ties" or "ties" in str(e.value)


def test_moved_experts_are_right():
    check_pass(Experts(), EXPERTS)


def test_data_that_is_given_is_used():
    graph = parse(SOFTMAX)
    graph.bind_weights({"w": torch.zeros(8)})
    check_pass(DeadCode(), graph)
    assert torch.equal(graph.weights["w"].weight.load(), torch.zeros(8))
    graph.weights["w"].weight = Weight.of("w", torch.ones(8))
    check_pass(DeadCode(), graph)


def test_a_pass_that_rounds_is_held_to_its_tolerance():
    check_pass(Rounds(), SOFTMAX, tolerance=2e-2)
    with pytest.raises(AssertionError, match="changes the meaning"):
        check_pass(Rounds(), SOFTMAX)
    with pytest.raises(AssertionError, match="changes the meaning"):
        check_pass(Rounds(), SOFTMAX, tolerance=1e-4)


@dataclass(frozen=True)
class Rounds(Rewrite):
    """Rounds what softmax gets to bf16."""

    def pattern(self, p, x):
        return p.softmax(x, axis=1)

    def replace(self, b, m):
        return b.softmax(b.cast(b.cast(m.x, dtype="bf16"), dtype="f32"), axis=-1)


@dataclass(frozen=True)
class WrongAt(Rewrite):
    """sum(x) over all → the same, but 1 more at some sizes"""

    size: int
    odd_only: bool = False

    def pattern(self, p, x):
        return p.sum(x, axes=(0, 1))

    def replace(self, b, m):
        size = b.dim(value=m.x.shape[0])
        wrong = b.and_(b.eq(b.mod(size, 2), 1), b.gt(size, 1)) if self.odd_only else b.eq(size, self.size)
        right = b.sum(b.sum(m.x, axes=(-1,)), axes=(0,))
        return b.add(right, b.cast(wrong, dtype="f32"))


SUM_ALL = """
graph(%x: f32[T, 8]) -> (%y: f32[]) {
  %0: f32[] = math.sum(%x) {axes=[0, 1]}
  return %0
}
"""


@pytest.mark.parametrize(("size", "odd_only", "seen_at"), [(1, False, "T=1"), (0, False, "T=0"), (0, True, "T=3")])
def test_a_rule_that_is_wrong_at_some_sizes(size, odd_only, seen_at):
    with pytest.raises(AssertionError, match=rf"rule wrong_at .* changes the meaning.*\({seen_at}\)"):
        check_pass(WrongAt(size, odd_only), SUM_ALL)
    check_pass(WrongAt(10**6), SUM_ALL)


@dataclass(frozen=True)
class DropsCasts(Rewrite):
    """cast(cast(x, a), b) → x where b is the dtype of x, whatever a loses"""

    def pattern(self, p, x):
        return p.cast(p.cast(x, dtype=p.attr("inner")), dtype=p.attr("outer"))

    def when(self, m):
        return m.no("another dtype") if m.outer != m.x.dtype else None

    def replace(self, b, m):
        return m.x


@pytest.mark.parametrize(
    ("own", "between", "right"),
    [
        ("f32", "f16", False), ("f32", "bf16", False), ("f32", "f8e4m3fn", False), ("f32", "i32", False),
        ("f32", "f64", True), ("bf16", "f32", True), ("f16", "f32", True), ("f16", "bf16", False),
    ],
)  # fmt: skip
def test_dropped_casts(own, between, right):
    graph = f"""
graph(%x: {own}[T, 8]) -> (%y: {own}[T, 8]) {{
  %0: {between}[T, 8] = math.cast(%x) {{dtype={between}}}
  %1: {own}[T, 8] = math.cast(%0) {{dtype={own}}}
  return %1
}}
"""
    if right:
        check_pass(DropsCasts(), graph)
    else:
        with pytest.raises(AssertionError, match="changes the meaning"):
            check_pass(DropsCasts(), graph)


@dataclass(frozen=True)
class OneForItself(Rewrite):
    """x / x → 1, which is wrong at 0"""

    def pattern(self, p, x):
        return p.div(x, x)

    def replace(self, b, m):
        return b.full(shape=m.x.shape, value=1.0, dtype="f32")


def test_a_rule_that_is_wrong_at_zero():
    with pytest.raises(AssertionError, match=r"changes the meaning.*whole-number inputs"):
        check_pass(OneForItself(), SUM.replace("math.add", "math.div"))


@dataclass(frozen=True)
class DropsClamp(Rewrite):
    """clamp(x) → x, as if nothing were beyond it"""

    def pattern(self, p, x):
        return p.clamp(x, low=p.attr("low"), high=p.attr("high"))

    def replace(self, b, m):
        return m.x


@pytest.mark.parametrize(("low", "high"), [("none", "7.0"), ("-7.0", "none"), ("-20.0", "20.0")])
def test_limits_that_normal_numbers_do_not_meet(low, high):
    with pytest.raises(AssertionError, match=r"changes the meaning.*many magnitudes"):
        check_pass(
            DropsClamp(),
            f"""
graph(%x: f32[T, 8]) -> (%y: f32[T, 8]) {{
  %0: f32[T, 8] = math.clamp(%x) {{low={low}, high={high}}}
  return %0
}}
""",
        )


def test_a_rule_that_fires_nowhere_is_told():
    with pytest.warns(UserWarning, match=r"rule fuse_swiglu \(.*\) fires nowhere in this graph"):
        check_pass(FuseSwiGLU(), AFTER)


class LastOfTies(Rewrite):
    """route with a selection bias → one that takes the last of tied experts"""

    def pattern(self, p, x, bias):
        return p.route(x, bias, k=2, scoring="sigmoid")

    def replace(self, b, m):
        return b.op("test.last_route", [m.x, m.bias])


def test_ties_are_seen_behind_a_selection_bias():
    """A bias that is added to the scores makes tied logits different choices, so it is also tried without."""

    @op("test.last_route", results=2)
    class LastRoute:
        """Top 2 of sigmoid(x) + bias, from the last expert on."""

        x: Operand
        bias: Operand

        def infer(self):
            shape = (self.x.shape[0], 2)
            return self.x.with_shape(shape), TensorType("i64", shape)

        def reference(self):
            scores = torch.sigmoid(self.x)
            chosen = (scores + self.bias).flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :2]
            experts = scores.shape[-1] - 1 - chosen
            weights = scores.gather(-1, experts)
            return weights / weights.sum(-1, keepdim=True), experts

    graph = """graph(%x: f32[T, 8]) -> (%w: f32[T, 2], %e: i64[T, 2]) {
  weight @gate: f32[6, 8]
  weight @bias: f32[6]
  %0: f32[T, 6] = linear.linear(%x, @gate, _)
  %1: f32[T, 2], %2: i64[T, 2] = moe.route(%0, @bias) {k=2, scoring="sigmoid"}
  return %1, %2
}
"""
    with pytest.raises(
        AssertionError, match=r"last_of_ties \(.*test_checks\.py:\d+\).*changes the meaning: output 'e'"
    ):
        check_pass(LastOfTies(), graph)
