"""From the user's arguments to the graph's inputs, and back."""

from __future__ import annotations

import json

import pytest
import torch

from moec.frontend import Signature, trace
from moec.ir import ArgumentTypeError, ArgumentValueError, ArtifactError, CompileError, run


class Net(torch.nn.Module):
    def forward(self, x, state=None, *, scale=1.0, flags=None):
        y = x * scale
        first = y if state is None else y + state["a"][0]
        return {"out": first, "pair": (x.sum(), None), "rows": x.shape[0], "tag": "t"}


@pytest.fixture(scope="module")
def traced():
    return trace(Net(), (torch.ones(2, 3),), {"state": {"a": [torch.ones(3)]}, "scale": 2.0})


def good():
    return (torch.rand(2, 3),), {"state": {"a": [torch.rand(3)]}, "scale": 2.0}


def test_names_and_constants(traced):
    assert traced.input_names == ("x", "state_a_0")
    assert traced.graph.output_names == ["out", "pair_0"]
    assert dict(traced.signature.constants) == {2: 2.0}


def test_round_trip_keeps_structure(traced):
    args, kwargs = good()
    got = traced.unflatten(run(traced.graph, traced.flatten(args, kwargs)))
    want = Net()(*args, **kwargs)
    assert list(got) == list(want)
    torch.testing.assert_close(got["out"], want["out"])
    torch.testing.assert_close(got["pair"][0], want["pair"][0])
    assert got["pair"][1] is None
    assert (got["rows"], got["tag"]) == (2, "t")


def test_names_and_positions_are_interchangeable(traced):
    (x,), kwargs = good()
    plain = traced.flatten((x,), kwargs)
    named, moved = traced.flatten((), {**kwargs, "x": x}), traced.flatten((x, kwargs["state"]), {"scale": 2.0})
    for other in (named, moved):
        assert [t.data_ptr() for t in other] == [t.data_ptr() for t in plain]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a, k: ((), k), ArgumentTypeError, "missing arguments: x"),
        (lambda a, k: (a, {"state": k["state"]}), ArgumentTypeError, "scale=2.0"),
        (lambda a, k: (a, k | {"scale": 3.0}), ArgumentValueError, "'scale' was 2.0"),
        (lambda a, k: (a, k | {"scale": torch.ones(())}), ArgumentValueError, "got a tensor"),
        (lambda a, k: (a, k | {"other": 1}), ArgumentTypeError, "not there at tracing: other"),
        (lambda a, k: (a, k | {"x": a[0]}), ArgumentTypeError, "given twice"),
        (lambda a, k: (a, k | {"state": {"b": [torch.ones(3)]}}), ArgumentTypeError, "nested differently"),
        (lambda a, k: (([1.0],), k), ArgumentTypeError, "nested differently"),
        (lambda a, k: ((1.0,), k), ArgumentTypeError, "'x' must be a torch.Tensor, got float"),
        (lambda a, k: ((a[0].double(),), k), ArgumentTypeError, "dtype f64, expected f32"),
        (lambda a, k: ((torch.ones(2, 4),), k), ArgumentValueError, "'x' axis 1 has size 4, expected 3"),
        (lambda a, k: ((torch.ones(2),), k), ArgumentValueError, "rank 1"),
        (lambda a, k: ((*a, None, 1, 2), {}), ArgumentTypeError, "positional"),
    ],
)
def test_wrong_calls_name_the_argument(traced, change, error, words):
    args, kwargs = change(*good())
    with pytest.raises(error) as e:
        traced.flatten(args, kwargs)
    assert words in e.value.message


def test_json_round_trip(traced):
    data = json.loads(json.dumps(traced.signature.to_dict()))
    assert Signature.from_dict(data) == traced.signature


FIELDS = ["in_spec", "out_spec", "parameters", "input_names", "constants", "outputs", "bounds"]


@pytest.mark.parametrize("field", FIELDS)
def test_malformed_json_names_the_field(traced, field):
    data = traced.signature.to_dict()
    for broken in ({k: v for k, v in data.items() if k != field}, data | {field: 7}):
        with pytest.raises(ArtifactError, match=f"'{field}'"):
            Signature.from_dict(broken)


def test_objects_as_arguments_are_refused():
    with pytest.raises(ArgumentTypeError) as e:
        trace(Net(), (object(),))
    assert "'x' is a builtins.object" in e.value.message


def test_exported_program():
    program = torch.export.export(
        Net(), (torch.ones(2, 3),), {"scale": 2.0}, dynamic_shapes={"x": {0: torch.export.Dim("n")}, "scale": None},
        strict=False,
    )  # fmt: skip
    traced = trace(program)
    assert [str(v.type) for v in traced.graph.inputs] == ["f32[B, 3]"]
    x = torch.rand(5, 3)
    got = traced.unflatten(run(traced.graph, traced.flatten((x,), {"scale": 2.0})))
    torch.testing.assert_close(got["out"], x * 2)
    assert got["rows"] == 5
    with pytest.raises(ArgumentTypeError, match="brings its own"):
        trace(program, (x,))


def test_not_a_module():
    with pytest.raises(ArgumentTypeError, match="got function"):
        trace(lambda x: x)
    with pytest.raises(CompileError, match="TorchScript"):
        trace(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), (torch.ones(1, 2),))


class Sum(torch.nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    "change", ["none", "parameter", "gradient", "not contiguous", "by name", "one too many", "none at all"]
)
def test_calls_with_tensors_only(change):
    """The short way for such calls does what the long one does."""
    shapes = ({0: "B"}, {0: "B"})
    signature = trace(Sum(), (torch.ones(2, 3), torch.ones(2, 3)), dynamic_shapes=shapes).signature
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    given = {
        "parameter": (torch.nn.Parameter(x), y),
        "gradient": (x.clone().requires_grad_(), y),
        "not contiguous": (x.T.contiguous().T, y),
        "one too many": (x, y, y),
        "none at all": (),
    }.get(change, (x, y))
    if change in ("one too many", "none at all"):
        with pytest.raises(ArgumentTypeError, match=r"expected 2 positional|missing arguments: x, y"):
            signature.flatten(given)
        return
    got = signature.flatten((), {"x": x, "y": y}) if change == "by name" else signature.flatten(given)
    assert [type(t) for t in got] == [torch.Tensor] * 2
    assert not any(t.requires_grad for t in got)
    assert torch.equal(got[0], x)
    assert torch.equal(got[1], y)
