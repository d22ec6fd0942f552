"""Compare a program with its model at sizes it was not traced at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

import torch

from moec.frontend.agreement import disagreement, eager, resized
from moec.frontend.branches import Jump, Taken
from moec.frontend.guards import Guard, limits
from moec.frontend.locate import import_path
from moec.frontend.ranges import ANY, interval, narrowed
from moec.frontend.signature import Signature
from moec.frontend.sizes import Bounds, Sizes, breaking, long, size_sets
from moec.ir import CompileError, Graph, Location
from moec.ir.dims import evaluate
from moec.ir.interpreter import bind_inputs

_TRACED = "traced"
_ALIKE = 4  # inputs of rows all alike


def recheck(
    model: torch.nn.Module,
    graph: Graph,
    signature: Signature,
    example: Sequence[torch.Tensor],
    declared: Bounds,
    guards: Sequence[Guard],
    replaced: Mapping[str, int] | None = None,
    branches: Set[Jump] = frozenset(),
) -> tuple[Bounds, tuple[str, ...], tuple[str, ...]]:
    """Run model and graph with small odd sizes, longer ones than traced, 1, 0, and sizes that break each of the guards.

    `replaced` names what something else stood in for while tracing, with lengths past which the two may part (see
    stand_ins): then the traced sizes are run too, and sequences of more than those lengths. `branches` were decided
    while tracing (see branches): the model has to go either way on some inputs, else inputs whose rows are all alike
    are tried, and the program is refused where that is not enough. Sizes that the model itself refuses, or that are
    outside the ranges the user `declared`, are left out. Returns what remains of the guards, as bounds and as
    conditions (one beyond which the two agree wherever it was tried is dropped: a branch that made no difference), and
    the sizes checked. Raises CompileError where the two disagree within the guards.
    """
    traced = bind_inputs(graph, example)
    bounds, _ = limits(guards)
    for s, r in declared.items():
        bounds[s] = narrowed(bounds.get(s, ANY), r)
    checked = []
    agreed: list[Sizes] = []
    parted: list[Sizes] = []
    positive: set[str] = set()
    replaced = replaced or {}
    sets = size_sets(traced, bounds, declared) if traced else {}
    bases = [b for b in (sets.get("odd"), dict(traced)) if b and all(g.holds(b) for g in guards)]
    sets |= breaking(guards, bases, declared)
    if replaced or branches:
        sets = {_TRACED: traced} | sets
    if replaced:
        sets |= long(graph, traced, max(replaced.values()))
    sets |= {f"alike {i}": traced for i in range(_ALIKE if branches else 0)}
    ways = Taken(branches)
    for name, sizes in sets.items():
        alike = name.startswith("alike")
        if alike and not ways.missing:
            break
        broken = [g for g in guards if not g.holds(sizes)]
        shapes = [[evaluate(d, sizes) for d in v.shape] for v in graph.inputs]
        inputs = [resized(t, shape) for t, shape in zip(example, shapes, strict=True)]
        if alike:
            inputs = [_alike(t, int(name.split()[1])) for t in inputs]
        with torch.no_grad(), Taken(branches) as taken:
            try:
                want = eager(model, signature, inputs)
            except Exception as e:  # the model does not take these sizes either, whatever it raises
                if name == _TRACED:
                    raise _not_compared(e, replaced) from e
                continue
        problem = disagreement(graph, signature, inputs, want)
        if problem is None:
            if name != "zero":  # where nothing is, nothing is found
                ways.add(taken)
            checked += [", ".join(f"{k}={v}" for k, v in sizes.items())] if sizes else []
            agreed.append(sizes)
        elif name == "zero":
            positive |= sizes.keys()
        elif broken:
            parted.append(sizes)
        else:
            raise _refused(name, sizes, problem, replaced, branches)
    if ways.missing:
        raise CompileError(
            "the model's control flow depends on the values of a tensor, and on the inputs tried it always went the "
            f"same way at {_shown(ways.missing)}",
            code="data-dependent",
            hint="leave the test out where the code behind it does nothing to an empty tensor, or give an example for "
            "which nothing is found there",
        )
    kept, dropped = _kept(guards, agreed, parted)
    bounds, conditions = limits(kept)
    for s, r in (*_left(dropped, agreed), *((s, (1, None)) for s in positive)):
        bounds[s] = narrowed(bounds.get(s, ANY), r)
    return {s: b for s, b in bounds.items() if b != ANY}, conditions, tuple(dict.fromkeys(checked))


def _kept(guards: Sequence[Guard], agreed: Sequence[Sizes], parted: Sequence[Sizes]) -> tuple[list[Guard], list[Guard]]:
    """The guards to keep: those that were not broken where the two agree, and of the others as many as rule out the
    sizes at which the two part. Then the ones to drop."""
    harmless = {g: sum(not g.holds(sizes) for sizes in agreed) for g in guards}
    kept = [g for g in guards if not harmless[g]]
    for sizes in parted:
        broken = [g for g in guards if not g.holds(sizes)]
        if not any(g in kept for g in broken):
            kept.append(min(broken, key=lambda g: harmless[g]))
        if all(g.stated is None for g in broken if g in kept):
            raise CompileError(
                f"the traced program holds only where {' and '.join(map(str, broken))}, which cannot be asked of a "
                f"call: at {_text(sizes)} it differs from the model",
                code="dynamic-shape",
                location=Location.merge(*(g.location for g in broken)),
                hint="compare sizes as integers, or make the axes it depends on static in dynamic_shapes",
            )
    return kept, [g for g in guards if g not in kept]


def _left(dropped: Sequence[Guard], agreed: Sequence[Sizes]) -> Iterator[tuple[str, tuple[int, None]]]:
    """What a dropped lower bound still says: sizes below the least at which the two agree were not tried."""
    for g in dropped:
        r = interval(g.stated.expr) if g.stated is not None else None
        if r is not None and r[0] > 0:
            (s,) = g.symbols
            yield s, (min(sizes[s] for sizes in agreed if not g.holds(sizes)), None)


def _refused(name: str, sizes: Sizes, problem: str, replaced: Mapping[str, int], branches: Set[Jump]) -> CompileError:
    other = "other values" if name.startswith("alike") else "other sizes" if name != _TRACED else ""
    what = f"{other or 'the sizes it was traced at'}: at {_text(sizes)}," if sizes else f"{other or 'its example'}:"
    why = f"; an op of ours stood in for {', '.join(replaced)}" if replaced else ""
    hint = (
        "the model fixed a size of the example arguments while tracing (a Python number taken from a shape, a cached "
        "table); trace with static shapes, or make that part depend on the input"
    )
    if branches:
        why += f"; it takes what is found by values not to be empty at {_shown(branches)}"
        if other != "other sizes":
            hint = (
                "the model does something else where nothing is found: replace that branch by tensor ops (torch.where, "
                "masks), so that it does nothing to an empty tensor"
            )
    elif not other:
        hint = "trace with check=False if the difference is meant, or change what makes the module look like that one"
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
        hint="run it where its kernels run, or trace with check=False",
    )
