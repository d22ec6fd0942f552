"""Whether two graphs mean the same: both run in float64 on seeded cases, and are compared value by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from moec.ir.cases import Case, candidate_bindings, fits, make_inputs, with_data
from moec.ir.compare import difference, interface_difference
from moec.ir.dims import evaluate
from moec.ir.errors import CompileError
from moec.ir.extremes import first_infinite, may_overflow
from moec.ir.graph import Graph, Value
from moec.ir.interpreter import run
from moec.ir.promote import Promoted, is_wide, promote_with_slack
from moec.ir.routers import PINS, pinned, router_logits, selects_by_size

# float64 has a unit of 1e-16; sums over thousands of terms and ill-conditioned steps (a softmax of large scores)
# cost some digits, and a wrong rule is off by far more than one part in 10⁹
RELATIVE = 1e-9
# `quant` accumulates in f32 by declaration: terms in another order differ by u·√K (Higham §2.8), times 8 for safety
F32_FACTOR = 8 * 2.0**-24
# a rewrite may drop the roundings that `promote_with_slack` describes, and add its own in their place
SLACK_FACTOR = 2.0
# … but never so much that an error of 1 % could hide in it (bf16 constants are known to 0.2 %)
SLACK_LIMIT = 2.0**-8


@dataclass(frozen=True)
class Difference:
    """The first way in which two graphs differ. `output` is None where they differ before any value does
    (signature, a run that fails); `index` is the element with the largest error."""

    reason: str
    case: Case | None = None
    output: str | None = None
    max_error: float = math.nan
    tolerance: float = math.nan
    index: tuple[int, ...] = ()
    expected: float | int | bool | None = None
    got: float | int | bool | None = None

    def __str__(self) -> str:
        if self.output is None or self.expected is None:
            return self.reason + (f" ({self.case.label})" if self.case else "")
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        under = f" ({self.case.label})" if self.case else ""
        return (
            f"output {self.output!r}{at}: expected {self.expected!r}, got {self.got!r}; {self.reason}, "
            f"largest error {self.max_error:.3g}, tolerance {self.tolerance:.3g}{under}"
        )


@dataclass(frozen=True)
class _Reference:
    """What the graph gives in a case; `logits` are its routers' where they are not pinned."""

    case: Case
    outputs: list[torch.Tensor]
    slack: list[float]
    logits: list[torch.Tensor]


@dataclass
class Oracle:
    """What `graph` means: its outputs on seeded cases, computed once; `difference(other)` compares.

    The cases are at least three bindings of the dims (all 1, odd, larger; each symbol 0 where the graph runs
    there), normal inputs and some of many magnitudes, and where the graph chooses among floats also ties, all
    tokens to one expert, every expert in turn. A graph with exponentials also has to stay finite on inputs up to 10⁴
    where this one does. `inputs`: run on these tensors only (in the graph's own dtypes).
    `pins`: whether something may stand in the place of logits, which presumes that they can take any value.
    Raises CompileError where the graph itself runs under no binding.
    """

    graph: Graph
    seed: int = 0
    inputs: Sequence[torch.Tensor] | None = None
    pins: bool = True
    references: list[_Reference] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.graph = with_data(self.graph, self.seed)
        self._promoted = promote_with_slack(self.graph)
        self._logits = router_logits(self._promoted.graph) if self.pins else []
        self.references = self._own_inputs() if self.inputs is not None else self._seeded()

    # -- cases -------------------------------------------------------------------------------------

    def _own_inputs(self) -> list[_Reference]:
        from moec.ir.interpreter import bind_inputs

        assert self.inputs is not None
        binding = bind_inputs(self.graph, self.inputs)
        return [self._run(Case("the given inputs", binding, tuple(self.inputs)))]

    def _seeded(self) -> list[_Reference]:
        found: list[_Reference] = []
        failure: CompileError | None = None
        tried: list[dict[str, int]] = []
        runs = 0
        symbols = sorted(self.graph.symbols)
        bindings = list(candidate_bindings(symbols)) if symbols else [{}, {}, {}]
        for i, binding in enumerate(bindings):
            if (binding in tried and symbols) or not fits(self.graph, binding):
                continue
            zero = 0 in binding.values()
            if not zero and runs >= 3:
                continue
            tried.append(binding)
            seed = self.seed if symbols else self.seed + i
            try:
                found += self._at(binding, seed, None if zero else runs)
                runs += not zero
            except CompileError as e:
                failure = e  # sizes that this graph does not take, unless it takes none
        if not runs and failure is not None:
            raise failure
        if not found:
            raise CompileError(
                f"no sizes for {', '.join(symbols)} fit the graph: a slice or shape is out of range in all that were "
                "tried",
                code="dims",
            )
        return found

    def _at(self, binding: dict[str, int], seed: int, run: int | None) -> list[_Reference]:
        """The cases of one binding: `run` counts the bindings without zeros. Choices of experts are tried in the
        second, where there are few rows, and in the third, where there are many."""
        label = ", ".join(f"{n}={s}" for n, s in binding.items()) or f"seed {seed}"
        inputs = make_inputs(self.graph, binding, seed)
        first = self._run(Case(label, binding, inputs))
        found = [first]
        if any(bool(t.isnan().any()) for t in first.outputs if t.is_floating_point()):
            positive = make_inputs(self.graph, binding, seed, positive=True)
            found.append(self._run(Case(f"{label}, positive inputs", binding, positive)))
        if run == 2 and any(t.is_floating_point() for t in inputs):
            wide = make_inputs(self.graph, binding, seed, wide=True)
            found.append(self._run(Case(f"{label}, inputs of many magnitudes", binding, wide)))
        for pin in {1: PINS[:-1], 2: PINS[-1:]}.get(run or 0, ()) if self._logits else ():
            found.append(self._run(Case(f"{label}, {pin} in the router", binding, inputs, pin), first.slack))
        if run == 1 and any(t.is_floating_point() for t in inputs):
            # zeros and ties, in a form that depends on no router being recognised
            plain = [("whole-number inputs", lambda t: t.round() + 0.0)]  # no negative zeros
            if selects_by_size(self._promoted.graph):
                plain.append(("zero inputs", torch.zeros_like))
            for what, change in plain:
                changed = tuple(change(t) if is_wide_torch(t.dtype) else t for t in inputs)
                found.append(self._run(Case(f"{label}, {what}: ties", binding, changed)))
        return found

    def _run(self, case: Case, slack: list[float] | None = None) -> _Reference:
        logits: dict[Value, torch.Tensor] = dict.fromkeys(self._logits, torch.empty(0))

        def see(value: Value, tensor: torch.Tensor) -> None:
            if value in logits:
                logits[value] = tensor

        outputs = evaluate_promoted(self._promoted.graph, case, self._logits, see)
        if slack is None:
            slack = _slack(outputs, self._promoted.rounded, case)
        return _Reference(case, outputs, slack, list(logits.values()))

    @property
    def cases(self) -> list[Case]:
        return [r.case for r in self.references]

    def vacuous(self) -> list[str]:
        """Names of outputs that are mostly NaN or empty in every case: a comparison says little of them."""

        def says_little(t: torch.Tensor) -> bool:
            return not t.numel() or int(t.isnan().sum()) * 2 > t.numel()

        return [
            name
            for i, name in enumerate(self.graph.output_names)
            if all(says_little(r.outputs[i]) for r in self.references)
        ]

    # -- comparison --------------------------------------------------------------------------------

    def difference(self, other: Graph, tolerance: float | None = None) -> Difference | None:
        """How `other` differs first, or None. `tolerance`: what may remain, relative to the largest magnitude of
        an output (None: what float64 leaves, see RELATIVE; more where ops with f32 inside take part). Weights of
        `other` without data get the data that the same names have here."""
        if _same(self.graph, other):
            return None
        signature = interface_difference(self.graph, other)
        if signature is not None:
            return Difference(signature)
        try:
            promoted = promote_with_slack(_sharing_data(self.graph, other, self.seed))
        except CompileError as e:
            return Difference(f"it does not run in float64: {e.message}")
        routers = _Routers(self._logits)
        slack = [0.0] * len(self.graph.outputs)
        for reference in self.references:
            case = reference.case
            if case.pin is None:
                routers.start(reference.logits)
            elif not routers.all_found:
                continue
            try:
                see = routers.see if case.pin is None else None
                got = evaluate_promoted(promoted.graph, case, routers.values, see)
                if case.pin is None and _has_derived_weights(promoted):
                    slack = _slack(got, promoted.rounded, case)
            except CompileError as e:
                return Difference(f"it fails: {e.message}", case)
            f32 = max(_f32_length(g, case.binding) for g in (self._promoted.graph, promoted.graph))
            relative = tolerance if tolerance is not None else RELATIVE + F32_FACTOR * math.sqrt(f32)
            for i, name in enumerate(self.graph.output_names):
                open_ = SLACK_FACTOR * (reference.slack[i] + slack[i])
                found = compare(reference.outputs[i], got[i], relative, open_)
                if found is not None:
                    reason, error, allowed, index = found
                    a, b = (t[index].item() if index or not t.dim() else None for t in (reference.outputs[i], got[i]))
                    return Difference(reason, case, name, error, allowed, index, a, b)
        if self.inputs is not None or not may_overflow(promoted.graph):
            return None
        return not_finite(self._promoted.graph, promoted.graph, self.large)

    @property
    def usual(self) -> Case:
        """The case of the largest sizes, with normal inputs."""
        return max((c for c in self.cases if c.pin is None), key=lambda c: sum(c.binding.values()))

    @cached_property
    def large(self) -> Case:
        """Inputs up to 10⁴, at the largest sizes."""
        binding = self.usual.binding
        label = ", ".join(f"{n}={s}" for n, s in binding.items()) or f"seed {self.seed}"
        return Case(f"{label}, large inputs", binding, make_inputs(self.graph, binding, self.seed, large=True))


class _Routers:
    """Finds, in another graph, the values that are the routers' logits of the first: those of the same elements
    in a run where nothing is pinned. It finds them whatever the other graph makes of them."""

    def __init__(self, logits: Sequence[Value]):
        self.count = len(logits)
        self.values: list[Value] = []
        self._wanted: list[torch.Tensor] = []
        self._found: set[int] = set()

    def start(self, wanted: list[torch.Tensor]) -> None:
        self.values, self._wanted, self._found = [], wanted, set()

    def see(self, value: Value, tensor: torch.Tensor) -> None:
        for i, w in enumerate(self._wanted):
            if w.numel() and bool((w == w.reshape(-1)[0]).all()):
                continue  # all the same number: anything may look like it
            if tensor.dtype != w.dtype or tensor.shape[-1:] != w.shape[-1:] or tensor.numel() != w.numel():
                continue
            if compare(w, tensor.reshape(w.shape), RELATIVE) is None:
                self.values.append(value)
                self._found.add(i)

    @property
    def all_found(self) -> bool:
        return len(self._found) == self.count


def not_finite(before: Graph, after: Graph, case: Case) -> Difference | None:
    """Where `after` is not finite in a case and `before` is (both promoted), or None; also where one of them does not
    run on it, which is for others to say."""
    try:
        found = first_infinite(evaluate_promoted(before, case), evaluate_promoted(after, case))
    except CompileError:
        return None
    if found is None:
        return None
    i, index, a, b = found
    reason = "it is not finite where the original is"
    return Difference(reason, case, before.output_names[i], math.inf, 0.0, index, a, b)


def first_difference(
    before: Graph,
    after: Graph,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    inputs: Sequence[torch.Tensor] | None = None,
) -> Difference | None:
    """How `after` differs from `before` in meaning, or None: see `Oracle`, which serves several comparisons with
    one graph. Raises CompileError where `before` itself does not run."""
    return Oracle(before, seed, inputs).difference(after, tolerance)


def bindings(graph: Graph) -> list[dict[str, int]]:
    """The sizes that comparisons run `graph` under: at least three where it has dims, all 1 and odd ones among
    them if they fit, 0 too where the graph runs there."""
    result: list[dict[str, int]] = []
    for case in Oracle(graph).cases:
        if dict(case.binding) not in result:
            result.append(dict(case.binding))
    return result


def evaluate_promoted(
    graph: Graph,
    case: Case,
    logits: Sequence[Value] = (),
    see: Callable[[Value, torch.Tensor], None] | None = None,
) -> list[torch.Tensor]:
    """Outputs of a promoted graph on a case's inputs, its routers' logits pinned as the case says; `see` is called
    with every value."""
    pins = set(logits)

    def tap(value: Value, tensor: torch.Tensor) -> torch.Tensor | None:
        if see is not None:
            see(value, tensor)
        return pinned(tensor, case.pin) if case.pin is not None and value in pins else None

    wide = [t.to(v.dtype.torch) for v, t in zip(graph.inputs, case.inputs, strict=True)]
    return run(graph, wide, tap=tap)


def compare(
    expected: torch.Tensor, got: torch.Tensor, relative: float, slack: float = 0.0
) -> tuple[str, float, float, tuple[int, ...]] | None:
    """None where equal: (what differs, largest error, tolerance, index of it) otherwise. Floats within `relative`
    of the largest finite magnitude plus `slack` (at most SLACK_LIMIT of that magnitude), NaN where NaN is,
    infinities and everything else exactly."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"{got.dtype} {list(got.shape)} for {expected.dtype} {list(expected.shape)}", math.inf, 0.0, ()
    if not expected.numel():
        return None
    a, b = expected.to(torch.float64), got.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs())
    error = torch.where(error.isnan(), math.inf, error)
    tolerance = 0.0
    if is_wide_torch(expected.dtype):
        tolerance = relative * _largest(a) + min(slack, SLACK_LIMIT * _largest(a))
    worst = int(error.argmax())
    largest = float(error.reshape(-1)[worst])
    if largest <= tolerance:
        return None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    return "values differ", largest, tolerance, index


def is_wide_torch(dtype: torch.dtype) -> bool:
    from moec.ir.types import DType

    return is_wide(DType.of(dtype))


def _largest(x: torch.Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.is_floating_point() or not a.numel() or a.shape != b.shape:
        return 0.0
    return _largest(a.to(torch.float64) - b.to(torch.float64))


def _slack(outputs: list[torch.Tensor], rounded: Graph | None, case: Case) -> list[float]:
    """How far the outputs are from those of the rounded variant."""
    if rounded is None:
        return [0.0] * len(outputs)
    return [_distance(a, b) for a, b in zip(outputs, evaluate_promoted(rounded, case), strict=True)]


def _same(before: Graph, after: Graph) -> bool:
    """Equal, down to where the weights' data comes from."""
    if difference(before, after) is not None:
        return False
    pairs = [(before, after), *((fn, after.functions[name]) for name, fn in before.functions.items())]
    sources = [(v.weight, b.weights[n].weight) for a, b in pairs for n, v in a.weights.items()]
    return all(v is not None and w is not None and v.source is w.source for v, w in sources)


def _sharing_data(before: Graph, after: Graph, seed: int) -> Graph:
    """`after` with the data of `before`'s weights where it has none of its own."""
    missing = {n for n, v in after.weights.items() if v.weight is not None and v.weight.source is None}
    known = {n: v.weight for n, v in before.weights.items() if n in missing and v.type == after.weights[n].type}
    if known:
        after = after.clone()
        after.bind_weights({n: w for n, w in known.items() if w is not None})
    return with_data(after, seed)


def _has_derived_weights(promoted: Promoted) -> bool:
    from moec.ir.weight import ComputedSource

    return any(isinstance(v.weight.source, ComputedSource) for v in promoted.graph.weights.values() if v.weight)


def _f32_length(graph: Graph, binding: Mapping[str, int]) -> int:
    """How many f32 products the ops that compute in f32 whatever they are given add up."""
    total = 0
    for node in graph.nodes:
        if node.op == "quant.scaled_linear":
            total += int(evaluate(node.operand("weight").shape[1], binding))
        elif node.op == "quant.scaled_experts":
            total += sum(int(evaluate(s, binding)) for s in node.operand("down").shape[1:])
        elif node.op.startswith("quant."):
            total += 1
    return total
