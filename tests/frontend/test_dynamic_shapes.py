"""dynamic_shapes: its forms, names, bounds, and models that fix a size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.export import Dim

from moec.frontend import trace
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError


class Add(torch.nn.Module):
    def forward(self, x, y):
        return x * 2 + y.sum()


class Branch(torch.nn.Module):
    """Another formula for four columns."""

    def forward(self, x):
        if x.shape[1] == 4:
            return x * 2
        return x


class AtLeast(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[1] > 3 else x - 1


class Frozen(torch.nn.Module):
    """Takes a length from the shape as a plain number, as a cached table does."""

    def forward(self, x):
        return x * float(torch.arange(len(range(x.shape[1]))).shape[0])


class Square(torch.nn.Module):
    def forward(self, x):
        n = int(x.shape[1] ** 0.5)
        return x.reshape(-1, n, n)


def types(traced) -> list[str]:
    return [str(v.type) for v in traced.graph.inputs]


EXAMPLE = (torch.ones(3, 4), torch.ones(5))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, ["f32[3, 4]", "f32[5]"]),
        ("auto", ["f32[B, S]", "f32[s0]"]),
        ({"x": {0: "rows"}}, ["f32[rows, 4]", "f32[5]"]),
        ({"x": {0: Dim("a"), 1: Dim("b")}, "y": {0: Dim("a")}}, ["f32[a, b]", "f32[a]"]),
        ({"x": {0: Dim("a")}, "y": {0: 2 * Dim("a")}}, ["f32[a, 4]", "f32[2*a]"]),
        (({1: Dim.DYNAMIC}, None), ["f32[3, S]", "f32[5]"]),
        (((Dim("a"), None), (Dim.AUTO,)), ["f32[a, 4]", "f32[B]"]),
        ({"x": {-1: Dim.AUTO}, "y": {0: Dim.STATIC}}, ["f32[3, S]", "f32[5]"]),
    ],
)
def test_forms(spec, expected):
    assert types(trace(Add(), EXAMPLE, dynamic_shapes=spec, check=False)) == expected


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"z": {0: "a"}}, "names ['z']"),
        (({0: "a"},), "1 entries for 2 arguments"),
        ({"x": {7: "a"}}, "no axis 7"),
        ({"x": ["a"]}, "rank 2"),
        ("dynamic", "'dynamic'"),
        ({"x": 3}, "must be a dict or a sequence"),
    ],
)
def test_bad_forms_say_what_is_wrong(spec, words):
    with pytest.raises(ArgumentTypeError) as e:
        trace(Add(), EXAMPLE, dynamic_shapes=spec)
    assert words in e.value.message


def test_specialised_axis_is_an_error_where_declared_and_a_note_where_left_open():
    with pytest.raises(CompileError) as e:
        trace(Branch(), (torch.ones(3, 4),), dynamic_shapes={"x": {1: "S"}})
    assert e.value.code == "dynamic-shape"
    assert "'x' axis 1" in e.value.message
    frame = e.value.location.frames[0]
    assert frame.file.endswith("test_dynamic_shapes.py")
    assert frame.line == Branch.forward.__code__.co_firstlineno + 1
    traced = trace(Branch(), (torch.ones(3, 4),), dynamic_shapes="auto")
    assert traced.specialised == ("x axis 1 = 4",)


def test_axis_tied_to_another_is_noted():
    class Tie(torch.nn.Module):
        def forward(self, x, y):
            return x.sum(1) + y

    traced = trace(Tie(), (torch.ones(3, 4), torch.ones(3)), dynamic_shapes={"x": {0: "a"}, "y": {0: "T"}})
    assert types(traced) == ["f32[a, 4]", "f32[a]"]
    assert traced.specialised == ("y axis 0 (T) = a",)


def test_range_guard_becomes_a_bound(same):
    traced = trace(AtLeast(), (torch.ones(3, 5),), dynamic_shapes="auto")
    assert traced.signature.bounds == {"S": (4, None)}
    same(traced, AtLeast(), (torch.ones(1, 4),))
    with pytest.raises(ArgumentValueError, match="S is 3; the program holds for at least 4"):
        traced.flatten((torch.ones(3, 3),))


def test_declared_range_is_kept():
    dim = Dim("n", min=2, max=8)
    traced = trace(Add(), EXAMPLE, dynamic_shapes={"x": {0: dim}})
    assert traced.signature.bounds == {"n": (2, 8)}
    with pytest.raises(ArgumentValueError, match="n is 9"):
        traced.flatten((torch.ones(9, 4), torch.ones(5)))


def test_sizes_zero_and_one_are_open_from_any_example(same):
    for rows in (1, 2):
        traced = trace(Add(), (torch.ones(rows, 4), torch.ones(5)), dynamic_shapes={"x": {0: "n"}})
        assert [*traced.checked] == [*(["n=3"] if rows == 1 else ["n=3", "n=4"]), "n=1", "n=0"]
        for n in (0, 1, 2, 7):
            same(traced, Add(), (torch.rand(n, 4), torch.ones(5)))


def test_program_that_froze_a_size_is_refused():
    class Cached(torch.nn.Module):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.table = float(int(str(x.shape[1]).isdigit()) or 24)
            return x * self.table

    model = Cached().eval()
    assert trace(model, (torch.ones(2, 24),), dynamic_shapes=None)

    class Averaged(torch.nn.Module):
        length = 0.0

        def forward(self, x):
            if not torch.compiler.is_exporting():
                return x / x.shape[1]
            return x / 24.0

    with pytest.raises(CompileError) as e:
        trace(Averaged(), (torch.ones(2, 24),), dynamic_shapes="auto")
    assert e.value.code == "dynamic-shape"
    assert "differs from the model's" in e.value.message
    assert trace(Averaged(), (torch.ones(2, 24),), dynamic_shapes="auto", check=False).checked == ()


def test_assumed_equation_is_named():
    with pytest.raises(CompileError) as e:
        trace(Square(), (torch.ones(3, 4),), dynamic_shapes={"x": {1: "n"}})
    assert e.value.code == "dynamic-shape"
    assert "the model assumes" in e.value.message
    assert "n" in e.value.message


def test_expression_shapes(same):
    class Flat(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x.flatten(0, 1), x[:, 0]])

    traced = trace(Flat(), (torch.ones(3, 4, 2),), dynamic_shapes={"x": {0: "B", 1: "S"}})
    assert str(traced.graph.outputs[0].type) == "f32[B*S + B, 2]"
    same(traced, Flat(), (torch.rand(5, 7, 2),))


@pytest.mark.parametrize("index", ["x[:, 1:] - x[:, :-1]", "x[:, -1:]", "x[:, -3:-1]", "x[:, :2]", "x[:, 1::2]",
                                   "x[:, 2:100]", "x[:, -1]", "x[:, x.shape[1] // 2 :]"])  # fmt: skip
def test_slices_of_a_dynamic_axis(index, same):
    class Cut(torch.nn.Module):
        def forward(self, x):
            return eval(index, {"x": x})

    traced = trace(Cut(), (torch.rand(2, 6),), dynamic_shapes={"x": {0: "B", 1: "S"}})
    for length in (4, 5, 9):
        same(traced, Cut(), (torch.rand(3, length),))


def test_bound_of_a_branch_that_makes_no_difference_is_dropped(same):
    class Join(torch.nn.Module):
        def forward(self, x, past):
            rows = torch.cat((past, x), 1)
            return (rows @ x.mT).softmax(-1), rows

    for past in (0, 1, 5):
        example = (torch.rand(1, 1, 4), torch.rand(1, past, 4))
        traced = trace(Join(), example, dynamic_shapes=({0: "B", 1: "S"}, {0: "B", 1: "P"}))
        assert traced.signature.bounds == {}
        assert str(traced.graph.outputs[1].type) == "f32[B, P + S, 4]"
        same(traced, Join(), (torch.rand(3, 6, 4), torch.rand(3, 9, 4)))


def test_regions_without_gradients_are_part_of_the_program(same):
    class Regions(torch.nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
            with torch.autocast("cpu", enabled=False):
                return y + x @ x.mT

    same(trace(torch.export.export(Regions(), (torch.rand(3, 3),), strict=False)), Regions(), (torch.rand(3, 3),))


def test_writes_into_a_dynamic_tensor(same):
    class Fill(torch.nn.Module):
        def forward(self, x, y):
            z = torch.zeros(x.shape[0], x.shape[1] + 2, 3)
            z[:, : x.shape[1]] = x
            z[:, x.shape[1] :] = 7
            z[:, 1:3] = 4
            z[:, -1:, 1] = y
            return z

    spec = {"x": {0: "B", 1: "S"}, "y": {0: "B"}}
    traced = trace(Fill(), (torch.rand(2, 4, 3), torch.rand(2, 1)), dynamic_shapes=spec)
    for length in (1, 2, 6):
        same(traced, Fill(), (torch.rand(3, length, 3), torch.rand(3, 1)))


def test_bound_of_a_branch_that_makes_no_difference_at_first_is_kept(same):
    """Padding by nothing does no harm one size above the bound; beyond, there is no padding by less than that."""

    class Padded(torch.nn.Module):
        def forward(self, x):
            rows, length = x.shape
            return torch.cat((x.new_zeros(rows, 4 - length), x), 1) if length < 4 else x[:, length - 4 :] * 1.0

    traced = trace(Padded(), (torch.rand(2, 3),), dynamic_shapes={"x": {1: "S"}})
    assert traced.signature.bounds == {"S": (0, 4)}
    for length in (0, 1, 2, 3, 4):
        same(traced, Padded(), (torch.rand(2, length),))
    traced = trace(Padded(), (torch.rand(2, 9),), dynamic_shapes={"x": {1: "S"}})
    assert traced.signature.bounds == {"S": (4, None)}


BOUNDS = (None, -6, -5, -2, -1, 0, 1, 2, 5)


@pytest.mark.parametrize("traced_at", [3, 9])
@pytest.mark.parametrize("start", BOUNDS)
def test_slices_at_every_length(same, start, traced_at):
    """Python's bounds, which count from the end and are cut at both ends, where the length is not known."""
    for end, step in itertools.product(BOUNDS, (1, 2)):

        class Cut(torch.nn.Module):
            def forward(self, x, end=end, step=step):
                return x[:, start:end:step].sum(1)

        traced = trace(Cut(), (torch.rand(2, traced_at),), dynamic_shapes={"x": {1: "T"}}, check=False)
        for length in range(1, 9):
            same(traced, Cut(), (torch.rand(2, length),))


@pytest.mark.parametrize("traced_at", [3, 9])
@pytest.mark.parametrize("declared", ["T", Dim("T", max=16)])
def test_tables_cut_to_a_length(same, traced_at, declared):
    """Precomputed rotary angles, learned positions, a mask kept as a buffer: lengths up to the table's hold."""

    class Tables(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = torch.nn.Parameter(torch.rand(16, 4))
            self.register_buffer("seen", torch.ones(1, 16, 16).tril())

        def forward(self, x):
            length = x.shape[1]
            x = x + self.positions[:length]
            scores = (x @ x.mT).masked_fill(self.seen[:, :length, :length] == 0, float("-inf"))
            return scores.softmax(-1) @ x

    model = Tables()
    traced = trace(model, (torch.rand(2, traced_at, 4),), dynamic_shapes={"x": {1: declared}})
    assert traced.signature.bounds == {"T": (0, 16)}
    assert types(traced)[0] == "f32[2, T, 4]"
    for length in (0, 1, 5, 16):
        same(traced, model, (torch.rand(2, length, 4),))
    with pytest.raises(ArgumentValueError, match="T is 17; the program holds for at most 16"):
        traced.flatten((torch.rand(2, 17, 4),))


def test_sizes_above_those_traced_are_compared():
    """A table that is longer than the example, and shorter than what comes later without an error."""

    class Repeats(torch.nn.Module):
        def forward(self, x):
            table = torch.arange(10.0)
            return x + table[torch.arange(x.shape[1]) % 10] * (1 if x.shape[1] <= 10 else 2)

    traced = trace(Repeats(), (torch.rand(2, 9),), dynamic_shapes={"x": {1: "T"}})
    assert traced.signature.bounds == {"T": (0, 10)}
