"""Index forms against what the values hold when they are computed, on random programs over positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import Builder, Dim, Graph, TensorType, run
from moec.ir.dims import evaluate
from moec.passes.clean.index_forms import Affine, Holds, index_form, unraveled

S, P = Dim("S"), Dim("P")
SIZES = ({"S": 1, "P": 0}, {"S": 3, "P": 1}, {"S": 5, "P": 4}, {"S": 0, "P": 2}, {"S": 2, "P": 0})


def start() -> tuple[Graph, Builder]:
    graph = Graph()
    graph.add_input("s", TensorType("f32", (S,)))
    graph.add_input("p", TensorType("f32", (P,)))
    return graph, Builder(graph)


def values(form: Affine | Holds, shape: tuple[int, ...], sizes: dict[str, int]) -> torch.Tensor:
    """What a form says, written out."""
    if isinstance(form, Affine):
        total = torch.full(shape, evaluate(form.const, sizes), dtype=torch.int64)
        for axis, factor in form.terms:
            index = torch.arange(shape[axis]).reshape([-1 if i - len(shape) == axis else 1 for i in range(len(shape))])
            total = total + evaluate(factor, sizes) * index
        return total
    result = torch.full(shape, not form.never)
    for c in form.conditions:
        result = result & (values(c, shape, sizes) >= 0)
    return result


def check(graph: Graph, form: Affine | Holds | None) -> None:
    """The form is what the graph's only output holds, at every size at which the graph runs."""
    if form is None:
        return
    for sizes in SIZES:
        (got,) = run(graph, [torch.zeros(sizes["S"]), torch.zeros(sizes["P"])])
        want = values(form, tuple(got.shape), sizes)
        assert torch.equal(got.to(want.dtype), want), (sizes, form, got)


# one step of a random program: (b, the values so far, a number) → a new value, or None where it does not apply
def _same_kind(pool, n, kind):
    return [v for v in pool if v.dtype == kind][:: 1 + n % 2]


INT_STEPS = {
    "positions": lambda b, x, y, n: b.arange(start=n % 3, end=[S + n % 3, S + P + n % 3][n % 2]),
    "steps": lambda b, x, y, n: b.mul(b.arange(end=S), n - 3),
    "add": lambda b, x, y, n: b.add(x, y),
    "sub": lambda b, x, y, n: b.sub(x, y),
    "plus": lambda b, x, y, n: b.add(x, n - 3),
    "past": lambda b, x, y, n: b.add(x, b.dim(value=P)),
    "times": lambda b, x, y, n: b.mul(x, b.dim(value=S)),
    "neg": lambda b, x, y, n: b.neg(x),
    "clamp": lambda b, x, y, n: b.clamp(x, low=n - 3),
    "row": lambda b, x, y, n: b.reshape(x, shape=(1, *x.shape)),
    "column": lambda b, x, y, n: b.reshape(x, shape=(*x.shape, 1)),
    "transpose": lambda b, x, y, n: b.transpose(x, perm=tuple(reversed(range(x.type.rank)))),
    "flatten": lambda b, x, y, n: b.reshape(x, shape=(x.type.numel,)),
    "expand": lambda b, x, y, n: b.expand(x, shape=(2, *x.shape)),
    "slice": lambda b, x, y, n: b.slice(x, axis=0, start=0, end=x.shape[0], step=1 + n % 2),
    "concat": lambda b, x, y, n: b.concat(x, y, axis=-1),
    "before": lambda b, x, y, n: b.concat(b.sub(b.const((0,), "i64", (1,)), 1), x, axis=-1),
    "sum": lambda b, x, y, n: b.cumsum(x, axis=-1),
    "where": lambda b, x, y, n: b.where(b.lt(x, n - 2), y, x),
    "gather": lambda b, x, y, n: b.gather(b.reshape(x, shape=(x.type.numel,)), b.arange(end=S)),
    "flag": lambda b, x, y, n: b.cast(b.ge(x, n - 3), dtype="i64"),
}
BOOL_STEPS = {
    "le": lambda b, x, y: b.le(x, y),
    "gt": lambda b, x, y: b.gt(x, y),
    "eq": lambda b, x, y: b.eq(x, y),
    "ne": lambda b, x, y: b.ne(x, y),
    "ge and lt": lambda b, x, y: b.and_(b.ge(x, y), b.lt(x, b.add(y, 3))),
    "not le": lambda b, x, y: b.not_(b.le(x, y)),
    "or": lambda b, x, y: b.or_(b.lt(x, y), b.ge(x, 0)),
}
PROGRAM = st.lists(
    st.tuples(st.sampled_from(sorted(INT_STEPS)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 7))
)


def build(b: Builder, program) -> list:
    from moec.ir import CompileError

    pool = [b.arange(end=S)]
    for name, i, j, n in program:
        x, y = pool[i % len(pool)], pool[j % len(pool)]
        try:
            v = INT_STEPS[name](b, x, y, n)
        except (CompileError, IndexError):  # shapes that do not fit this step
            continue
        if v.type.rank <= 4:
            pool.append(v)
    return pool


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PROGRAM, st.integers(0, 9), st.integers(0, 9), st.sampled_from(sorted(BOOL_STEPS)))
def test_forms_are_what_values_hold(program, i, j, comparison):
    from moec.ir import CompileError

    graph, b = start()
    pool = build(b, program)
    x, y = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
    try:
        last = [x, BOOL_STEPS[comparison](b, x, y)]
    except CompileError:  # shapes that do not broadcast
        last = [x]
    for v in last:
        single = graph.clone()
        twin = next(
            r
            for n, m in zip(graph.nodes, single.nodes, strict=True)
            for r, o in zip(m.results, n.results, strict=True)
            if o is v
        )
        single.add_output(twin)
        runnable = _without_failures(single)
        if runnable:
            check(single, index_form(twin))


def _without_failures(graph: Graph) -> bool:
    """Random gathers may be out of range; such programs say nothing."""
    from moec.ir import CompileError
    from moec.passes import DeadCode

    small = DeadCode().run(graph)
    try:
        for sizes in SIZES:
            run(small, [torch.zeros(sizes["S"]), torch.zeros(sizes["P"])])
    except CompileError:
        return False
    return True


def test_the_check_can_fail():
    graph, b = start()
    v = b.le(b.arange(end=S), 2)
    graph.add_output(v)
    check(graph, index_form(v))
    with pytest.raises(AssertionError):
        check(graph, Holds(frozenset({Affine.of(1, {-1: -1})})))


@pytest.mark.parametrize(
    ("index", "known"),
    [
        (Affine.of(0, {-2: S, -1: 1}), True),
        (Affine.of(1, {-2: S, -1: 1}), False),  # the last element of a row is the first of the next
        (Affine.of(0, {-2: 1, -1: S}), False),  # columns as rows: B may exceed S
        (Affine.of(-1, {-2: S, -1: 1}), False),
        (Affine.of(0, {-2: 2 * S, -1: 1}), False),
        (Affine.of(0, {-1: 1}), True),  # the first row
    ],
)
def test_row_major_numbers_come_apart_only_within_rows(index, known):
    found = unraveled(index, (Dim("B"), S), (Dim("B"), S))
    assert (found is not None) == known


def test_an_axis_of_one_element_does_not_vary_when_it_is_broadcast():
    graph, b = start()
    v = b.expand(b.reshape(b.arange(start=4, end=5), shape=(1, 1)), shape=(3, 1))
    graph.add_output(b.add(v, b.reshape(b.arange(end=S), shape=(1, S))))
    form = index_form(graph.outputs[0])
    assert form == Affine.of(4, {-1: 1})
    check(graph, form)


@pytest.mark.parametrize(
    ("build_value", "form"),
    [
        (lambda b: b.expand(b.arange(start=4, end=5), shape=(3,)), Affine.of(4)),
        (lambda b: b.slice(b.arange(end=9), axis=0, start=1, end=8, step=3), Affine.of(1, {-1: 3})),
        (
            lambda b: b.slice(b.ge(b.arange(end=9), 4), axis=0, start=1, end=8, step=3),
            Holds(frozenset({Affine.of(-3, {-1: 3})})),
        ),
        (lambda b: b.reshape(b.add(b.reshape(b.arange(end=S), shape=(S, 1)), b.arange(end=4)), shape=(4 * S,)), None),
        (lambda b: b.reshape(b.add(b.reshape(b.arange(end=4), shape=(4, 1)), b.arange(end=2)), shape=(2, 4)), None),
        (lambda b: b.transpose(b.expand(b.arange(end=S), shape=(2, S)), perm=(1, 0)), Affine.of(0, {-2: 1})),
        (lambda b: b.cumsum(b.full(shape=(2, S), value=3, dtype="i64"), axis=1), Affine.of(3, {-1: 3})),
        (
            lambda b: b.gather(b.arange(end=S), b.sub(b.arange(end=S), b.sub(b.dim(value=S), 1))),
            None,
        ),  # negative indices count from the end
    ],
)
def test_forms_of_single_steps(build_value, form):
    graph, b = start()
    v = build_value(b)
    graph.add_output(v)
    assert index_form(v) == form
    check(graph, form)


def test_sizes_are_not_taken_for_positive_where_they_may_be_zero():
    graph, b = start()
    past = b.ge(b.sub(b.dim(value=P), 1), 0)  # P ≥ 1 is not known
    graph.add_output(past)
    form = index_form(past)
    assert isinstance(form, Holds)
    assert not form.always
    check(graph, form)
