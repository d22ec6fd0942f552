"""A table of mistakes that authors of rules make: each is one message that names the rule's file and line."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moec.ir import Builder, CompileError, Graph, TensorType, Weight
from moec.passes.rewrite import Rewrite, RuleSet
from moec.passes.rewriting.explain import explain

from .small_rules import graph_of


def no_pattern_needed(**methods):
    return {"pattern": lambda s, p, x: p.silu(x), "replace": lambda s, b, m: m.x, "when": lambda s, m: None, **methods}


def captured_tensor(s, b, m):
    return b.mul(m.x, torch.ones(4))


def changes_attribute(s, b, m):
    m.root.producer.attrs["approximate"] = "tanh"
    return m.x


def changes_operand(s, b, m):
    m.root.producer.graph.replace_operand(m.root.producer, 0, m.root.producer.graph.inputs[1])
    return m.x


def changes_type(s, b, m):
    m.x.type = TensorType("bf16", (4,))
    return b.neg(m.x)


def erases(s, b, m):
    graph = m.root.producer.graph
    graph.replace_value(m.root, m.x)
    graph.erase(m.root.producer)
    return m.x


def adds_behind_its_back(s, b, m):
    m.root.producer.graph.create("math.neg", [m.x])
    return m.x


def shared_root(s, p, x):
    act = p.silu(x)
    return p.neg(p.shared(act)), act


def forgets_return(s, m):
    m.no("never")


OTHER_WEIGHT = Graph().add_weight(Weight.of("w", torch.ones(4)))

# what is wrong: (the methods of the rule, the message)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    # in pattern
    "unknown op": ({"pattern": lambda s, p, x: p.siluu(x)}, "unknown op 'siluu'"),
    "attribute typo": (
        {"pattern": lambda s, p, x: p.softmax(x, axes=1)},
        "no attribute 'axes'.*\n.*did you mean 'axis'",
    ),
    "missing attribute": ({"pattern": lambda s, p, x: p.cast(x)}, "attribute 'dtype' is required"),
    "attribute of a wrong kind": (
        {"pattern": lambda s, p, x: p.softmax(x, axis="last")},
        "'axis' must be int, got str",
    ),
    "wrong arity": ({"pattern": lambda s, p, x: p.mul(x)}, "takes 2 operands, got 1"),
    "forgotten return in pattern": ({"pattern": lambda s, p, x: None}, r"pattern\(\) returned nothing"),
    "unused capture": ({"pattern": lambda s, p, x, y: p.silu(x)}, "capture 'y' .* is not used"),
    "undeclared capture": ({"pattern": lambda s, p, x: p.mul(x, y)}, "pattern.. raised NameError: name 'y'"),  # noqa: F821
    "root is a capture": ({"pattern": lambda s, p, x: x}, "must return the result of an op"),
    "root is shared": ({"pattern": shared_root}, "a root of the pattern cannot be shared"),
    "results not unpacked": ({"pattern": lambda s, p, x: p.neg(p.topk(x, k=1))}, "has 2 results; unpack it"),
    "operand of a wrong kind": ({"pattern": lambda s, p, x: p.mul(x, "two")}, "cannot be str"),
    "dim as a string": ({"pattern": lambda s, p, x: p.reshape(x, shape=("B", ...))}, "p.dim\\('B'\\) captures it"),
    "tree of sub": (
        {"pattern": lambda s, p, x: p.tree("sub", p.repeat(lambda v: p.neg(v)))},
        "math.sub is not commutative",
    ),
    "unused capture of a repetition": (
        {"pattern": lambda s, p, x: p.tree("add", p.repeat(lambda v, w: p.mul(v, x)))},
        "capture 'w' of p.repeat",
    ),
    "capture with a name of the match": (
        {"pattern": lambda s, p, values: p.silu(values)},
        "cannot be called values",
    ),
    "two rests": (
        {"pattern": lambda s, p, x: p.concat(p.rest("a"), p.neg(x), p.rest("b"), axis=-1)},
        "more than one p.rest or p.repeat",
    ),
    "a bound rest": (
        {"pattern": lambda s, p, x: p.concat(x, p.bind("all", p.rest("b")), axis=-1)},
        "p.rest stands among the operands",
    ),
    "no root": ({"pattern": lambda s, p: ()}, r"pattern\(\) returned no value"),
    "a root twice": ({"pattern": lambda s, p, x: [p.silu(x)] * 2}, "the same value twice"),
    # in when
    "exception in when": ({"when": lambda s, m: m.x.nope}, "when.. raised AttributeError"),
    "when returns a bool": ({"when": lambda s, m: False}, "returned False.*\n.*return m.no"),
    "forgotten return in when": ({"when": forgets_return}, "called m.no..never.. and went on"),
    "unknown capture in when": ({"when": lambda s, m: m.up.type}, "no capture 'up'"),
    # in replace
    "forgotten return in replace": ({"replace": lambda s, b, m: None}, "returned nothing"),
    "wrong dtype": ({"replace": lambda s, b, m: b.cast(m.x, dtype="bf16")}, r"bf16\[B, 4\] for f32\[B, 4\]"),
    "wrong shape": ({"replace": lambda s, b, m: b.sum(m.x, axes=(-1,))}, r"returned f32\[.*\] for f32\[B, 4\]"),
    "dim mismatch": ({"replace": lambda s, b, m: b.mul(m.x, b.const([1.0] * 3, "f32", (3,)))}, "B, 4.*3"),
    "unknown op in replace": ({"replace": lambda s, b, m: b.swigloo(m.x)}, "unknown op 'swigloo'"),
    "attribute typo in replace": ({"replace": lambda s, b, m: b.softmax(m.x, axi=1)}, "no attribute 'axi'"),
    "too many values": ({"replace": lambda s, b, m: (m.x, m.x)}, "expected 1 Value"),
    "unknown capture": ({"replace": lambda s, b, m: m.z}, "no capture 'z'"),
    "exception in replace": ({"replace": lambda s, b, m: 1 / 0}, "raised ZeroDivisionError"),
    "tensor that is no weight": ({"replace": captured_tensor}, "got Tensor.*\n(.*\n)*.*b.weight"),
    "weight of another graph": ({"replace": lambda s, b, m: b.mul(m.x, OTHER_WEIGHT)}, "another graph: weight @w"),
    "value of another graph": ({"replace": lambda s, b, m: Builder(Graph()).const(1.0)}, "value of another graph"),
    "rebuilds the match": ({"replace": lambda s, b, m: b.silu(m.x)}, "would fire forever"),
    "uses what it replaces": ({"replace": lambda s, b, m: b.neg(m.root)}, "uses the value that it"),
    "loops": ({"replace": lambda s, b, m: b.silu(b.neg(m.x))}, "do not terminate"),
    "changes an attribute": ({"replace": changes_attribute}, "changed the matched graph itself"),
    "changes an operand": ({"replace": changes_operand}, "changed the matched graph itself"),
    "changes a type": ({"replace": changes_type}, "changed the matched graph itself"),
    "erases by itself": ({"replace": erases}, "changed the matched graph itself"),
    "adds nodes by itself": ({"replace": adds_behind_its_back}, "changed the matched graph itself"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_author_mistakes_name_the_rule_and_its_line(mistake):
    methods, message = MISTAKES[mistake]
    r = dataclass(frozen=True)(type("Careless", (Rewrite,), no_pattern_needed(**methods)))()
    graph = graph_of(lambda b, x, y: b.mul(b.silu(x), y))
    before = str(graph)
    with pytest.raises(CompileError, match=message) as error:
        RuleSet((r,)).run(graph)
    assert error.value.code in ("rule", "endless")
    assert re.search(r"rule careless \(.*test_author_mistakes\.py:\d+\)", error.value.message)
    assert str(error.value).count("rule careless") == 1
    assert str(graph) == before


@pytest.mark.parametrize("mistake", ["exception in when", "when returns a bool", "forgotten return in when"])
def test_explain_names_the_rule_whose_when_is_wrong(mistake):
    methods, message = MISTAKES[mistake]
    r = dataclass(frozen=True)(type("Careless", (Rewrite,), no_pattern_needed(**methods)))()
    with pytest.raises(CompileError, match=message) as error:
        explain(r, graph_of(lambda b, x, y: b.silu(x)))
    assert re.search(r"rule careless \(.*test_author_mistakes\.py:\d+\)", error.value.message)
