"""The text format: round trips, and errors with line and column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import Builder, CompileError, Dim, Graph, Location, TensorType, Weight, parse
from moec.ir.dims import parse_size
from moec.ir.location import Frame

EXAMPLE = """graph(%ids: i64[B, S]) -> (%logits: f32[B, S, 8]) {
  weight @model.embed.weight: f32[16, 8]
  %0: f32[B, S, 8] = tensor.gather(@model.embed.weight, %ids) loc("model.embed" "model.py":12) origin("embedding")
  %1: f32[B, S, 8] = norm.rms(%0, _) {eps=1e-05} loc("model.norm" "model.py":88, "model" "model.py":90)
  return %1
}
"""


def test_example_round_trips():
    graph = parse(EXAMPLE)
    assert str(graph) == EXAMPLE
    assert parse(str(graph)) == graph
    (gather, norm) = graph.nodes
    assert gather.location.module == "model.embed"
    assert norm.location.module == "model"
    assert norm.operands[1] is None


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.lists(names, min_size=1, max_size=3, unique=True),
    weight=names,
    value=st.floats(allow_nan=True, width=32),
    module=names,
    origin=names,
    line=st.integers(0, 10**6),
)
def test_any_names_and_numbers_round_trip(inputs, weight, value, module, origin, line):
    graph = Graph()
    values = [graph.add_input(n, TensorType("f32", (Dim("B"), 2))) for n in inputs]
    w = graph.add_weight(Weight.of(weight, torch.ones(2)))
    b = Builder(graph, location=Location((Frame(module, "a file.py", line),)))
    y = b.add(b.mul(values[0], w), b.const(value))
    y.origins = frozenset({origin, "b"})
    graph.add_output(y, inputs[-1])
    again = parse(str(graph))
    assert again == graph
    assert str(again) == str(graph)


sizes = st.recursive(
    st.sampled_from([Dim("B"), Dim("S"), Dim("T"), 1, 2, 3, 7]),
    lambda inner: st.tuples(inner, st.sampled_from("+*-/%"), inner).map(
        lambda t: {
            "+": lambda a, b: a + b,
            "*": lambda a, b: a * b,
            "-": lambda a, b: a + b,
            "/": lambda a, b: a // b if isinstance(b, int) and b else a,
            "%": lambda a, b: a % b if isinstance(b, int) and b else a,
        }[t[1]](t[0], t[2])
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(size=sizes)
def test_dims_round_trip_and_evaluate(size):
    assert parse_size(str(size)) == size
    binding = {"B": 3, "S": 5, "T": 0}
    if isinstance(size, Dim):
        assert size.evaluate(binding) == size.substitute(binding)


def test_sizes_of_several_arguments_round_trip():
    """The comma inside of Max( , ) ends no size."""
    text = "graph(%x: f32[Max(0, S - 1), B]) -> (%y: f32[Max(0, S - 1), B]) {\n  return %x\n}\n"
    assert str(parse(text)) == text


def test_large_sizes_stay_exact():
    assert (Dim("B") * (2**40)).evaluate({"B": 2**20 + 1}) == 2**60 + 2**40
    assert ((Dim("B") + 1) // 2).evaluate({"B": 2**60}) == 2**59


def test_nested_floors_of_sizes_become_one():
    """Sizes behind a chain of strided convolutions, at every size the same as step by step."""
    size: Dim | int = Dim("h")
    for _ in range(5):
        size = (size - 1) // 2 + 1
    assert str(size).count("floor") == 1
    for h in range(200):
        n = h
        for _ in range(5):
            n = (n - 1) // 2 + 1
        assert isinstance(size, Dim)
        assert size.evaluate({"h": h}) == n


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tensor.gather", "tensor.gatherr", r"line 3.*unknown op 'tensor.gatherr'"),
        ("%ids)", "%id)", r"line 3.*%id is used before it is defined"),
        ("f32[B, S, 8] = tensor.gather", "f32[B, S, 9] = tensor.gather", r"has type \(f32\[B, S, 9\]\)"),
        ("@model.embed.weight, %ids", "@model.embed, %ids", r"weight @model.embed is not declared"),
        ("{eps=1e-05}", "{epsilon=1e-05}", r"no attribute 'epsilon'"),
        ("i64[B, S]", "i65[B, S]", r"unknown dtype 'i65'"),
        ("return %1", "return %0, %1", r"returns 2 values, declares 1"),
        ("return %1", "return %1\n}\n}", r"text after the end"),
        ("%1: f32", "%0: f32", r"%0 is defined twice"),
        ("norm.rms(%0, _)", "norm.rms(%0, _, _)", r"takes 1 to 2 operands, got 3"),
        ("8]) {", "8]) ", r"expected '\{'"),
        ("i64[B, S]", "i64[B, -3]", r"bad size -3"),
        ("i64[B, S]", "i64[B, 9223372036854775808]", r"bad size"),
        ("i64[B, S]", "i64[B, S.x]", r"bad dimension"),
    ],
)
def test_bad_text_is_refused(old, new, message):
    assert old in EXAMPLE
    with pytest.raises(CompileError, match=message):
        parse(EXAMPLE.replace(old, new))


def test_truncated_text_is_refused_everywhere():
    for cut in range(0, len(EXAMPLE) - 2, 7):
        with pytest.raises(CompileError):
            parse(EXAMPLE[:cut])


def test_equality_sees_each_part():
    graph = parse(EXAMPLE)
    for old, new in [
        ("eps=1e-05", "eps=2e-05"),
        ('"model.py":12', '"model.py":13'),
        ('origin("embedding")', 'origin("embedding2")'),
        ("@model.embed.weight", "@model.embed.w"),
        ("%logits", "%scores"),
        ("[16, 8]", "[17, 8]"),
    ]:
        assert parse(EXAMPLE.replace(old, new)) != graph
    digests = EXAMPLE.replace("f32[16, 8]", 'f32[16, 8] sha256="ab"')
    assert parse(digests) == graph  # one side has none
    assert parse(digests) != parse(digests.replace('"ab"', '"cd"'))
