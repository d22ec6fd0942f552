"""Compare a dynamic program with its model at sizes it was not traced at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.frontend.branches import Line, Taken
from moec.frontend.guards import Guard
from moec.frontend.locate import import_path
from moec.frontend.signature import Signature
from moec.ir import CompileError, Dim, Graph, Location, run
from moec.ir.dims import evaluate
from moec.ir.interpreter import bind_inputs

Bounds = dict[str, tuple[int, int | None]]

# a wrong branch or a frozen size shows everywhere; a flipped near-tie of the routing in few rows
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_TRACED = "traced"
_ALIKE = 4  # inputs of rows all alike
_CHEAP = 256  # upper bounds up to this size are tried beyond
_MAY_DIFFER = {torch.float64: 0.0, torch.float32: 0.02, torch.float16: 0.25, torch.bfloat16: 0.25}


def recheck(
    model: torch.nn.Module,
    graph: Graph,
    signature: Signature,
    example: Sequence[torch.Tensor],
    declared: Bounds,
    guards: Sequence[Guard],
    replaced: Mapping[str, int] | None = None,
    branches: Set[Line] = frozenset(),
) -> tuple[Bounds, tuple[str, ...]]:
    """Run model and graph with small odd sizes, longer ones than traced, 1, 0, just beyond bounds and well above
    upper ones.

    `replaced` names what something else stood in for while tracing, with lengths past which the two may part (see
    stand_ins): then the traced sizes are run too, and sequences of more than those lengths. `branches` are lines whose
    branch was decided while tracing (see branches): the model has to go either way on some inputs, else inputs whose
    rows are all alike are tried, and the program is refused where that is not enough. Sizes that the model itself
    refuses, or that are outside the ranges the user `declared`, are left out. Returns the bounds that remain
    (one beyond which the two agree wherever it was tried is dropped: a branch that made no difference) and the sizes
    checked. Raises CompileError where the two disagree within the bounds.
    """
    bounds = dict(signature.bounds)
    traced = bind_inputs(graph, example)
    checked = []
    held: set[tuple[str, bool, int]] = set()  # symbol, whether above its bounds, a size at which the two agree
    firm: set[tuple[str, bool]] = set()
    replaced = replaced or {}
    sets = _size_sets(traced, bounds, declared)
    if replaced or branches:
        sets = {_TRACED: traced} | (sets if traced else {})
    if replaced:
        sets |= _long(graph, traced, max(replaced.values()))
    sets |= {f"alike {i}": traced for i in range(_ALIKE if branches else 0)}
    ways = Taken(branches)
    for name, sizes in sets.items():
        alike = name.startswith("alike")
        if alike and not ways.missing:
            break
        outside = [s for s, n in sizes.items() if s in bounds and not _inside(n, bounds[s])]
        shapes = [[evaluate(d, sizes) for d in v.shape] for v in graph.inputs]
        inputs = [_resized(t, shape) for t, shape in zip(example, shapes, strict=True)]
        if alike:
            inputs = [_alike(t, int(name.split()[1])) for t in inputs]
        with torch.no_grad(), Taken(branches) as taken:
            try:
                want = _eager(model, signature, inputs)
            except Exception as e:  # the model does not take these sizes either, whatever it raises
                if name == _TRACED:
                    raise _not_compared(e, replaced) from e
                continue
        problem = _disagreement(graph, signature, inputs, want)
        shown = ", ".join(f"{k}={v}" for k, v in sizes.items())
        if problem is None:
            if name != "zero":  # where nothing is, nothing is found
                ways.add(taken)
            checked += [shown] if shown else []
            held |= {(s, sizes[s] > bounds[s][0], sizes[s]) for s in outside}
        elif outside and name != "zero":
            firm |= {(s, sizes[s] > bounds[s][0]) for s in outside}
        elif not outside and name != "zero":
            broken = [g for g in guards if not g.holds(sizes)]
            why = f"; tracing assumed {' and '.join(dict.fromkeys(map(str, broken)))}" if broken else ""
            if replaced:
                why += f"; an op of ours stood in for {', '.join(replaced)}"
            if branches:
                why += f"; it takes what is found by values not to be empty at {_shown(branches)}"
            what = "other values" if alike else "other sizes" if name != _TRACED else "the sizes it was traced at"
            raise CompileError(
                f"the traced program does not hold for {what}: at {shown} {problem}{why}",
                code="dynamic-shape",
                location=Location.merge(*(g.location for g in broken)),
                hint="the model fixed a size of the example arguments while tracing (a Python number taken from a "
                "shape, a cached table); trace with static shapes, or make that part depend on the input",
            )
        elif name == "zero":
            bounds |= {s: (max(1, bounds.get(s, (0, None))[0]), bounds.get(s, (0, None))[1]) for s in sizes}
    if ways.missing:
        raise CompileError(
            "the model's control flow depends on the values of a tensor, and on the inputs tried it always went the "
            f"same way at {_shown(ways.missing)}",
            code="data-dependent",
            hint="leave the test out where the code behind it does nothing to an empty tensor, or give an example for "
            "which nothing is found there",
        )
    for s, above, size in held:
        least, greatest = bounds[s]
        if (s, above) not in firm:
            bounds[s] = (least, None) if above else (min(size, least), greatest)
    return {s: b for s, b in bounds.items() if b != (0, None)}, tuple(checked)


def _shown(lines: Set[Line]) -> str:
    return ", ".join(f"{import_path(file)}:{number}" for file, number in sorted(lines))


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


def _long(graph: Graph, traced: Mapping[str, int], length: int) -> dict[str, dict[str, int]]:
    """Sizes with which a sequence that goes through a state is longer than `length`, the others 1."""
    sequences = [q.shape[1] for n in graph.find("attention.linear_attention") if (q := n.operand("q")) is not None]
    symbols = sorted({s for n in sequences if isinstance(n, Dim) for s in n.symbols})
    return {f"long {s}": dict.fromkeys(traced, 1) | {s: length + 3} for s in symbols if s in traced}


def _size_sets(traced: Mapping[str, int], bounds: Bounds, declared: Bounds) -> dict[str, dict[str, int]]:
    odd, longer = {}, {}
    for i, (s, n) in enumerate(traced.items()):
        least, greatest = bounds.get(s, (0, None))
        size, more = max(3 + 2 * i + (n == 3 + 2 * i), least), n + 2 + i
        odd[s], longer[s] = (size, more) if greatest is None else (min(size, greatest), min(more, greatest))
    sets = {"odd": odd, "longer": longer, "one": dict.fromkeys(traced, 1), "zero": dict.fromkeys(traced, 0)}
    if longer == odd:
        del sets["longer"]
    above = {s: g + 1 for s, (_, g) in bounds.items() if g is not None and g < _CHEAP and s in traced}
    if above:
        sets["above"] = odd | above
        sets["far above"] = odd | {s: 2 * n + 3 for s, n in above.items()}
    below = {s: b[0] - 1 for s, b in bounds.items() if b[0] > 2 and s in traced}
    if below:
        sets["below"] = odd | below
    if any(b[0] > 1 for b in bounds.values()):
        del sets["zero"]
    return {k: v for k, v in sets.items() if all(_inside(n, declared[s]) for s, n in v.items() if s in declared)}


def _inside(n: int, bound: tuple[int, int | None]) -> bool:
    return n >= bound[0] and (bound[1] is None or n <= bound[1])


def _resized(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example's values repeated or cut along every axis, so that ids and masks stay plausible."""
    for axis, n in enumerate(shape):
        if t.shape[axis] == n:
            continue
        if t.shape[axis] == 0:
            t = torch.zeros(*t.shape[:axis], n, *t.shape[axis + 1 :], dtype=t.dtype, device=t.device)
        else:
            t = t.index_select(axis, torch.arange(n, device=t.device) % t.shape[axis])
    return t


def _eager(model: torch.nn.Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> list[Any]:
    rest = iter([t.clone() for t in inputs])
    leaves = [
        signature.constants[i] if i in signature.constants else next(rest) for i in range(signature.in_spec.num_leaves)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return pytree.tree_leaves(model(*args, **kwargs))


def _disagreement(
    graph: Graph, signature: Signature, inputs: Sequence[torch.Tensor], want: Sequence[Any]
) -> str | None:
    try:
        got = run(graph, [t.cpu() for t in inputs])
    except CompileError as e:
        return f"it fails: {e.message}"
    tensors = [
        (torch.view_as_real(w) if kind == "complex" else w, got[i])
        for (kind, i), w in zip(signature.outputs, want, strict=False)
        if kind != "constant" and isinstance(w, torch.Tensor)
    ]
    if len(want) != len(signature.outputs):
        return f"the model returns {len(want)} values, the program {len(signature.outputs)}"
    for (w, g), name in zip(tensors, graph.output_names, strict=False):
        if w.shape != g.shape:
            return f"output {name!r} has shape {list(g.shape)}, the model's {list(w.shape)}"
        if _differs(w.cpu(), g):
            return f"output {name!r} differs from the model's by up to {_distance(w.cpu(), g):.3g}"
    return None


def _differs(want: torch.Tensor, got: torch.Tensor) -> bool:
    if not want.numel():
        return False
    if want.dtype not in _TOLERANCE:
        return float((want != got).float().mean()) > 0.02
    tolerance = _TOLERANCE[want.dtype]
    finite = want[want.isfinite()].double().abs()
    scale = float(finite.square().mean().sqrt()) if finite.numel() else 1.0
    absolute = tolerance * max(scale, 1e-6)
    close = torch.isclose(got.double(), want.double(), rtol=tolerance, atol=absolute, equal_nan=True)
    return float((~close).double().mean()) > _MAY_DIFFER[want.dtype]


def _distance(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want.double() - got.double()).abs().nan_to_num().max())
