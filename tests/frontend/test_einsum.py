"""Einstein sums mean what NumPy's do, as torch writes them and as ONNX does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec.frontend.context import Context
from moec.frontend.einsum import einsum
from moec.frontend.symbols import Symbols
from moec.ir import CompileError, DType, Graph, TensorType, run


def lowered(equation: str, arrays: list[np.ndarray], path: tuple[int, ...] = ()) -> Graph:
    graph = Graph()
    c = Context(graph, Symbols())
    c.op = "einsum"
    dtype = DType.I64 if arrays[0].dtype == np.int64 else DType.F64
    values = [graph.add_input(f"x{i}", TensorType(dtype, a.shape)) for i, a in enumerate(arrays)]
    graph.add_output(einsum(c, equation, values, path), "y")
    graph.verify()
    return graph


@st.composite
def sums(draw):
    """An equation that NumPy takes, with operands."""
    letters = "abcde"
    sizes = {x: draw(st.integers(0, 4)) for x in letters}
    wide = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    words, shapes = [], []
    for _ in range(draw(st.integers(1, 4))):
        word = draw(st.lists(st.sampled_from(letters), max_size=4))
        repeated = {x for x in word if word.count(x) > 1}
        shape = [1 if x not in repeated and draw(st.integers(0, 5)) == 0 else sizes[x] for x in word]
        at = draw(st.integers(0, len(word))) if draw(st.booleans()) else None
        if at is not None:
            part = [1 if draw(st.integers(0, 5)) == 0 else n for n in wide[draw(st.integers(0, len(wide))) :]]
            word, shape = [*word[:at], "...", *word[at:]], [*shape[:at], *part, *shape[at:]]
        words.append("".join(word))
        shapes.append(tuple(shape))
    equation = ",".join(words)
    if draw(st.booleans()):
        present = sorted({x for w in words for x in w if x != "."})
        kept = draw(st.permutations([x for x in present if draw(st.booleans())]))
        at = draw(st.integers(0, len(kept)))
        open_axes = ["..."] if "..." in equation else []  # NumPy wants them in the result
        equation += "->" + "".join([*kept[:at], *open_axes, *kept[at:]])
    return equation, shapes


@given(sums(), st.integers(0, 2**31), st.booleans())
@settings(max_examples=300, deadline=None)
def test_means_what_numpy_means(case, seed, integers):
    equation, shapes = case
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(-4, 5, s) if integers else rng.standard_normal(s) for s in shapes]
    want = np.einsum(equation, *arrays)
    got = run(lowered(equation, arrays), [torch.from_numpy(np.asarray(a)) for a in arrays])[0]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


def test_the_order_of_products_can_be_chosen():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in ((2, 3), (3, 4), (4, 5), (5,))]
    want = np.einsum("ab,bc,cd,d->a", *arrays)
    for path in ((), (2, 3, 1, 2, 0, 1), (3, 2, 0, 1, 0, 1)):
        graph = lowered("ab,bc,cd,d->a", arrays, path)
        got = run(graph, [torch.from_numpy(a) for a in arrays])[0]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)
        assert len(graph.find("linear.matmul")) == 3


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ab,bc->ac", [(2, 3)]),  # one operand too few
        ("ab->a", [(2,)]),  # a letter without an axis
        ("a->a", [(2, 3)]),  # an axis without a letter
        ("ab,bc->ac", [(2, 3), (4, 5)]),
        ("aa->a", [(2, 3)]),
        ("ab->aa", [(2, 3)]),
        ("ab->ac", [(2, 3)]),
    ],
)
def test_equations_that_do_not_fit(equation, shapes):
    with pytest.raises(CompileError) as error:
        lowered(equation, [np.zeros(s) for s in shapes])
    assert error.value.code == "type"
    assert "einsum: " in str(error.value)


@pytest.mark.parametrize(
    ("equation", "dtypes", "shapes"),
    [
        ("ij,ik->ijk", (torch.float32, torch.int64), [(2, 3), (2, 4)]),
        ("ij,ij->ij", (torch.float32, torch.bool), [(2, 3), (2, 3)]),
        ("ij,ij->ij", (torch.bfloat16, torch.float32), [(2, 3), (2, 3)]),
        ("i,j->ij", (torch.float32, torch.float64), [(2,), (3,)]),
        ("ij,ij->ij", (torch.bool, torch.bool), [(2, 3), (2, 3)]),
        ("ij->i", (torch.bool,), [(2, 3)]),
        ("ij->i", (torch.int32,), [(2, 3)]),
        ("ij->", (torch.int8,), [(2, 3)]),
        ("ij,k->ik", (torch.int32, torch.int32), [(2, 3), (4,)]),
        ("ij,jk->ik", (torch.int32, torch.int32), [(2, 3), (3, 4)]),
        ("ij,jk->ik", (torch.float16, torch.float16), [(2, 3), (3, 4)]),
        ("ij->i", (torch.bfloat16,), [(2, 3)]),
    ],
)
def test_dtypes_of_torch(equation, dtypes, shapes):
    class Model(torch.nn.Module):
        def forward(self, *xs):
            return torch.einsum(equation, *xs)

    xs = tuple((torch.rand(s) * 5).to(d) for s, d in zip(shapes, dtypes, strict=True))
    (got,), want = run(moec.trace(Model(), xs), list(xs)), Model()(*xs)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_traced_as_it_is_written():
    """One product, with no second trace that takes torch's einsum apart; sizes stay open."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 4, 6))

        def forward(self, x, gates):
            return torch.einsum("btef,bte->btf", torch.einsum("btd,edf->btef", x, self.weight), gates)

    model = Experts()
    graph = moec.trace(model, (torch.randn(2, 3, 4), torch.rand(2, 3, 5)), dynamic_shapes=({0: "B", 1: "T"},) * 2)
    assert len(graph.find("linear.matmul")) == 2
    for shape in ((1, 1), (4, 7), (2, 0)):
        x, gates = torch.randn(*shape, 4), torch.rand(*shape, 5)
        torch.testing.assert_close(run(graph, [x, gates])[0], model(x, gates))
