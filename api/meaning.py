"""Whether what a pass made of a graph means the same, and if not, which application of a rule made it wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from moec.graph_text import graph_diff
from moec.ir import CompileError, Graph
from moec.ir.equivalence import Difference, Oracle, not_finite
from moec.ir.extremes import may_overflow, with_large_weights
from moec.ir.promote import promote
from moec.ir.routers import selection_biases, without_biases
from moec.passes import Pass, run_pass
from moec.passes.rewriting.engine import Application, limited

Fault = Callable[[Graph], "Difference | None"]  # how a graph differs from what it should mean


class Meaning:
    """What a graph means, in all the cases of `moec.ir.equivalence.Oracle`. Raises CompileError where the graph itself
    does not run."""

    def __init__(self, graph: Graph, tolerance: float | None = None, seed: int = 0):
        self.graph, self._tolerance, self._seed = graph, tolerance, seed
        self.oracle = Oracle(graph, seed)

    @cached_property
    def _biases(self) -> set[str]:
        return selection_biases(self.graph)

    @cached_property
    def _even(self) -> Oracle | None:
        # a bias that is added for the selection only breaks ties of the logits
        even = without_biases(self.graph, self._biases)
        return None if even is None else Oracle(even, self._seed)

    def difference(self, after: Graph) -> Difference | None:
        """How another graph differs first, or None."""
        found = self.oracle.difference(after, self._tolerance)
        even = None if found is not None or self._even is None else without_biases(after, self._biases)
        return found if even is None or self._even is None else self._even.difference(even, self._tolerance)


def overflow_with_large_weights(rule: Pass, graph: Graph, result: Graph, seed: int) -> tuple[Graph, Fault] | None:
    """The graph with large weights and how to see what is wrong there, where the rule makes of it what is not finite,
    though it is. `graph` has data; `result` is what the rule makes of it, which is asked first: without exponentials
    there is nothing to look for."""
    if not may_overflow(result):
        return None
    large = with_large_weights(graph)
    try:
        case, promoted = Oracle(graph, seed).usual, promote(large)
        after, _ = run_pass(rule, large.clone())
    except CompileError:  # the rule reads its weights, and refuses these
        return None

    def fault(after: Graph) -> Difference | None:
        return not_finite(promoted, promote(after), case)

    return (large, fault) if fault(after) is not None else None


def accusation(rule: Pass, graph: Graph, result: Graph, fault: Fault) -> str:
    """Which application of a rule within `rule` made `graph` wrong, where, and what it changed; for a pass that applies
    no rules, all that it changed."""
    found = _first_wrong(rule, graph, fault)
    if found is None:
        return graph_diff(graph, result)
    number, count, application, before, after = found
    name = "" if application.rule is rule else f" of {application.name}"
    where = f", {application.location.describe()}" if application.location else ""
    return f"  at application {number} of {count}{name}{where}\n{graph_diff(before, after)}"


def _first_wrong(rule: Pass, graph: Graph, fault: Fault) -> tuple[int, int, Application, Graph, Graph] | None:
    """(number from 1, how many there are, the application, the graph before and after it), by halving."""

    def after(limit: int | None) -> tuple[Graph, list[Application]]:
        with limited(limit) as applied:
            return run_pass(rule, graph.clone())[0], applied.applications

    try:
        count = len(after(None)[1])
        low, high = 0, count
        if not count or fault(after(0)[0]) is not None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fault(after(middle)[0]) is None else (low, middle)
        before, (wrong, applied) = after(low)[0], after(high)
    except CompileError:  # what it gives when it is stopped in between need not be valid
        return None
    return high, count, applied[high - 1], before, wrong
