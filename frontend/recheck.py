"""Compare a program with its model at sizes it was not traced at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

import sympy
import torch

from moec.frontend.agreement import disagreement, eager, inputs_at
from moec.frontend.beyond import AskedAt, beyond
from moec.frontend.branches import Jump, Taken
from moec.frontend.guards import Guard, limits
from moec.frontend.locate import import_path
from moec.frontend.ranges import ANY, interval, narrowed
from moec.frontend.signature import Signature
from moec.frontend.sizes import Bounds, Sizes, breaking, long, size_sets
from moec.ir import CompileError, Graph, Location
from moec.ir.interpreter import bind_inputs

_TRACED = "traced"
_ALIKE = 4  # inputs of rows all alike
_ROUNDS = 6  # of branches behind branches


def recheck(
    model: torch.nn.Module,
    graph: Graph,
    signature: Signature,
    example: Sequence[torch.Tensor],
    declared: Bounds,
    guards: Sequence[Guard],
    asked_at: AskedAt,
    replaced: Mapping[str, int] | None = None,
    branches: Set[Jump] = frozenset(),
) -> tuple[Bounds, tuple[str, ...], tuple[str, ...]]:
    """Run model and graph with small odd sizes, longer ones than traced, 1, 0, and sizes that break each of the guards.

    `asked_at` traces the model at other sizes (see beyond). `replaced` names what something else stood in for while
    tracing, with lengths past which the two may part (see stand_ins): then the traced sizes are run too, and sequences
    of more than those lengths. `branches` were decided while tracing (see branches): the model has to go either way on
    some inputs, else inputs whose rows are all alike are tried, and the program is refused where that is not enough.
    Sizes that the model itself refuses, or that are outside the ranges the user `declared`, are left out. Returns what
    remains of the guards, as bounds and as conditions (one beyond which the two agree wherever it was tried is dropped:
    a branch that made no difference), and the sizes checked. Raises CompileError where the two disagree within the
    guards.
    """
    traced = bind_inputs(graph, example)
    bounds, _ = limits(guards)
    for s, r in declared.items():
        bounds[s] = narrowed(bounds.get(s, ANY), r)
    replaced = replaced or {}
    sets = size_sets(traced, bounds, declared) if traced else {}
    bases = [b for b in (sets.get("odd"), dict(traced)) if b and all(g.holds(b) for g in guards)]
    sets |= breaking(guards, bases, declared)
    if replaced or branches:
        sets = {_TRACED: traced} | sets
    if replaced:
        sets |= long(graph, traced, max(replaced.values()))
    sets |= {f"alike {i}": traced for i in range(_ALIKE if branches else 0)}
    trials = _Trials(model, graph, signature, example, list(guards), replaced, branches)
    trials.run(sets)
    if trials.ways.missing:
        raise CompileError(
            "the model's control flow depends on the values of a tensor, and on the inputs tried it always went the "
            f"same way at {_shown(trials.ways.missing)}",
            code="data-dependent",
            hint="leave the test out where the code behind it does nothing to an empty tensor, or give an example for "
            "which nothing is found there",
        )
    kept, dropped = trials.kept(asked_at, declared)
    bounds, conditions = limits(kept)
    for s, r in (*_left(dropped, trials.agreed), *((s, (1, None)) for s in trials.positive)):
        bounds[s] = narrowed(bounds.get(s, ANY), r)
    return {s: b for s, b in bounds.items() if b != ANY}, conditions, tuple(dict.fromkeys(trials.checked))


class _Trials:
    """Sizes at which model and program agreed, and at which they parted where a guard is broken."""

    def __init__(self, model: torch.nn.Module, graph: Graph, signature: Signature, example: Sequence[torch.Tensor],
                 guards: list[Guard], replaced: Mapping[str, int], branches: Set[Jump]):  # fmt: skip
        self.model, self.graph, self.signature, self.example = model, graph, signature, example
        self.guards, self.replaced, self.branches = guards, replaced, branches
        self.checked: list[str] = []
        self.agreed: list[Sizes] = []
        self.parted: list[Sizes] = []
        self.positive: set[str] = set()
        self.ways = Taken(branches)

    def run(self, sets: Mapping[str, Sizes]) -> None:
        for name, sizes in sets.items():
            alike = name.startswith("alike")
            if alike and not self.ways.missing:
                break
            inputs = inputs_at(self.graph, self.example, sizes)
            if alike:
                inputs = [_alike(t, int(name.split()[1])) for t in inputs]
            with torch.no_grad(), Taken(self.branches) as taken:
                try:
                    want = eager(self.model, self.signature, inputs)
                except Exception as e:  # the model does not take these sizes either, whatever it raises
                    if name == _TRACED:
                        raise _not_compared(e, self.replaced) from e
                    continue
            problem = disagreement(self.graph, self.signature, inputs, want)
            if problem is None:
                if name != "zero":  # where nothing is, nothing is found
                    self.ways.add(taken)
                self.checked += [_text(sizes)] if sizes else []
                self.agreed.append(sizes)
            elif name == "zero":
                self.positive |= sizes.keys()
            elif any(not g.holds(sizes) for g in self.guards):
                self.parted.append(sizes)
            else:
                raise _refused(name, sizes, problem, self.replaced, self.branches)

    def kept(self, asked_at: AskedAt, declared: Bounds) -> tuple[list[Guard], list[Guard]]:
        """The guards to keep and the ones to drop, after branches behind those to drop were tried too."""
        traced: dict[str, list[Guard] | None] = {}

        def once(sizes: Sizes) -> list[Guard] | None:
            if str(sizes) not in traced:
                traced[str(sizes)] = asked_at(sizes)
            return traced[str(sizes)]

        needed: list[Guard] = []
        for i in range(_ROUNDS):
            kept, dropped = _kept(self.guards, self.agreed, self.parted, needed)
            found, more = beyond(dropped, self.guards, self.agreed, once)
            if not found and not more:
                break
            needed += more if i + 1 < _ROUNDS else [*more, *(weaker.than for weaker in found)]
            self.guards += [weaker.guard for weaker in found]
            self.run(breaking([w.guard for w in found], [w.sizes for w in found], declared))
            kept, dropped = _kept(self.guards, self.agreed, self.parted, needed)
        said = {g.stated.expr for g in kept if g.stated is not None}
        return [
            g for g in kept if g.stated is None or not said & {*sympy.Or.make_args(g.stated.expr)} - {g.stated.expr}
        ], dropped


def _kept(
    guards: Sequence[Guard], agreed: Sequence[Sizes], parted: Sequence[Sizes], needed: Sequence[Guard]
) -> tuple[list[Guard], list[Guard]]:
    """The guards to keep: the needed ones, those that were not broken where the two agree, and of the others as many as
    rule out the sizes at which the two part. Then the ones to drop."""
    harmless = {g: sum(not g.holds(sizes) for sizes in agreed) for g in guards}
    kept = [g for g in guards if not harmless[g] or g in needed]
    for sizes in parted:
        broken = [g for g in guards if not g.holds(sizes)]
        if not any(g in kept for g in broken):
            kept.append(min(broken, key=lambda g: harmless[g]))
        if all(g.stated is None for g in broken if g in kept):
            raise _unasked(broken, f"at {_text(sizes)} it differs from the model")
    unasked = [g for g in needed if g.stated is None]
    if unasked:
        raise _unasked(unasked, "what the model does elsewhere cannot be traced")
    return kept, [g for g in guards if g not in kept]


def _left(dropped: Sequence[Guard], agreed: Sequence[Sizes]) -> Iterator[tuple[str, tuple[int, None]]]:
    """What a dropped lower bound still says: sizes below the least at which the two agree were not tried."""
    for g in dropped:
        r = interval(g.stated.expr) if g.stated is not None else None
        if r is not None and r[0] > 0:
            (s,) = g.symbols
            yield s, (min(r[0], *(sizes[s] for sizes in agreed if not g.holds(sizes))), None)


def _unasked(guards: Sequence[Guard], why: str) -> CompileError:
    return CompileError(
        f"the traced program holds only where {' and '.join(map(str, guards))}, which cannot be asked of a call: {why}",
        code="dynamic-shape",
        location=Location.merge(*(g.location for g in guards)),
        hint="compare sizes as integers, or make the axes it depends on static in dynamic_shapes",
    )


def _refused(name: str, sizes: Sizes, problem: str, replaced: Mapping[str, int], branches: Set[Jump]) -> CompileError:
    other = "other values" if name.startswith("alike") else "other sizes" if name != _TRACED else ""
    what = f"{other or 'the sizes it was traced at'}: at {_text(sizes)}," if sizes else f"{other or 'its example'}:"
    why = f"; an op of ours stood in for {', '.join(replaced)}" if replaced else ""
    hint = (
        "the model fixed a size of the example arguments while tracing (a Python number taken from a shape, a cached "
        "table); trace with static shapes, or make that part depend on the input"
    )
    if branches:
        why += f"; at {_shown(branches)} the model branches on values, and what they find was taken not to be empty"
        if other != "other sizes":
            hint = (
                "the model does something else where nothing is found: replace that branch by tensor ops (torch.where, "
                "masks), so that it does nothing to an empty tensor"
            )
    elif not other:
        hint = (
            "what has a kernel's name, or looks like one of its modules, is taken for it: give it another name if it "
            "computes something else"
        )
    return CompileError(f"the traced program does not hold for {what} {problem}{why}", code="dynamic-shape", hint=hint)


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sizes.items())


def _shown(jumps: Set[Jump]) -> str:
    return ", ".join(f"{import_path(file)}:{number}" for file, number in sorted({(j.file, j.line) for j in jumps}))


def _alike(t: torch.Tensor, i: int) -> torch.Tensor:
    """All rows as one of them, all integers as one: what is chosen by row is chosen the same for each."""
    if t.is_floating_point() and t.dim() > 1 and t.numel():
        rows = t.reshape(-1, t.shape[-1])
        return rows[i % len(rows)].expand(t.shape).clone()
    if not t.is_floating_point() and t.dtype is not torch.bool and t.numel():
        return torch.full_like(t, int(t.reshape(-1)[i % t.numel()]))
    return t


def _not_compared(error: Exception, replaced: Mapping[str, int]) -> CompileError:
    return CompileError(
        f"an op of ours stood in for {', '.join(replaced)}, but the model itself does not run here, so that the two "
        f"cannot be compared: {type(error).__name__}: {error}",
        code="trace",
        hint="trace it where its kernels run",
    )
