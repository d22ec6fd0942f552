"""Passes as text: every shipped name, round trips, and what a mistake is told."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir import ArgumentValueError, DType, Graph
from moec.passes import (
    FoldConstants,
    Pass,
    PlaceExperts,
    QuantizeWeights,
    Rewrite,
    RuleSet,
    parse_pass,
    parse_passes,
    print_pass,
)
from moec.passes.fuse.fuse_mlp import FuseSwiGLU
from moec.passes.registry import load_file, shipped_passes
from moec.passes.spec import print_passes

RULES = """
from dataclasses import dataclass
from helper_beside import EPS
from moec.passes import Rewrite

@dataclass(frozen=True)
class FuseX(Rewrite):
    eps: float = EPS
    def pattern(self, p, x):
        return p.silu(x)
    def replace(self, b, m):
        return b.silu(m.x)

class Half(Rewrite):
    def pattern(self, p, x):
        return p.silu(x)

nothing = 3
"""


@dataclass(frozen=True)
class Inner:
    """A nested group of options."""

    size: int = 3
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative")


@dataclass(frozen=True)
class Everything(Pass):
    """A field of every kind."""

    number: int
    flag: bool = False
    ratio: float = 0.5
    text: str = "plain"
    limit: int | None = None
    either: int | float | str = 1
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = ("a",)
    loose: tuple = ()
    mode: Literal["fast", "exact", 2] = "fast"
    dtype: DType = DType.F32
    inner: Inner = field(default_factory=Inner)
    first: Rewrite = field(default_factory=FuseSwiGLU)
    rules: tuple[Rewrite, ...] = ()
    anything: Any = None
    computed: int = field(default=0, init=False)

    def run(self, graph: Graph) -> Graph:
        return graph


texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["none", "true", "inf", "nan", "1", "-1e5", 'a"b', "a\\b", "a,b}", "[x]", "", "é", "x=1", " a ", "a/b.py:C", "\n"]
)
floats = st.floats(allow_nan=False)
scalars = st.none() | st.booleans() | st.integers() | floats | texts
everything = st.builds(
    Everything,
    number=st.integers(),
    flag=st.booleans(),
    ratio=floats,
    text=texts,
    limit=st.none() | st.integers(),
    either=st.integers() | floats | texts,
    pair=st.tuples(st.integers(), floats),
    many=st.lists(texts, max_size=3).map(tuple),
    loose=st.lists(scalars | st.tuples(scalars), max_size=3).map(tuple),
    mode=st.sampled_from(["fast", "exact", 2]),
    dtype=st.sampled_from(list(DType)),
    inner=st.builds(Inner, st.integers(min_value=0), st.lists(texts, max_size=2).map(tuple)),
    rules=st.lists(st.just(FuseSwiGLU()), max_size=2).map(tuple),
    anything=scalars,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells 1 from 1.0 and True, and -0.0 from 0.0."""
    return a == b and repr(a) == repr(b)


@settings(max_examples=300, deadline=None)
@given(everything)
def test_print_and_parse_are_inverse(p):
    assert same(parse_pass(print_pass(p)), p)
    both = print_passes([p, FuseSwiGLU(), p])
    assert same(parse_passes(both), (p, FuseSwiGLU(), p))


def test_not_a_number_survives():
    back = parse_pass(print_pass(Everything(1, ratio=math.nan, either=-math.inf)))
    assert isinstance(back, Everything)
    assert math.isnan(back.ratio)
    assert back.either == -math.inf


def test_every_shipped_pass_and_rule_has_a_name_and_a_round_trip():
    shipped = shipped_passes()
    for name in ("fuse_swiglu", "fuse_mlp", "canonicalise", "dead_code", "add_rms_norm", "no_op_reshape"):
        assert name in shipped
    for name, (cls, instances) in shipped.items():
        required = [
            f
            for f in dataclasses.fields(cls)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if required and len(instances) != 1:
            with pytest.raises(ArgumentValueError, match=f"needs the option '{required[0].name}'"):
                parse_pass(name)
            continue
        p = parse_pass(name)
        assert type(p) is cls
        assert same(parse_pass(print_pass(p)), p)
        for instance in instances:
            assert same(parse_pass(print_pass(instance)), instance)


def test_a_rules_own_name_sets_its_options():
    assert parse_pass("no_op_reshape") == parse_pass('no_op_shape{op="tensor.reshape"}')
    assert parse_pass("no_op_reshape").name == "no_op_reshape"
    assert parse_pass("fold_constants") == FoldConstants()


def test_options_are_converted():
    p = parse_pass("fold_constants{limit=8}")
    assert p == FoldConstants(limit=8)
    q = parse_pass("quantize_weights{quantization={activations=none, block=[64, 32], keep=[]}}")
    assert isinstance(q, QuantizeWeights)
    assert (q.quantization.activations, q.quantization.block, q.quantization.keep) == (None, (64, 32), ())
    r = parse_pass("rule_set{rules=[fuse_swiglu, silu], quiet=true,}")
    assert isinstance(r, RuleSet)
    assert [x.name for x in r.rules] == ["fuse_swiglu", "silu"]
    assert [p.name for p in parse_passes(" dead_code , fold_constants { limit = 8 } ")] == [
        "dead_code",
        "fold_constants",
    ]


def test_arrays():
    mesh = "{nodes=1, gpus_per_node=2, slots_per_gpu=2}"
    text = f"place_experts{{placement={{mesh={mesh}, physical_to_logical=[[0, 1, 2, 0]]}}}}"
    p = parse_pass(text)
    assert isinstance(p, PlaceExperts)
    assert p.placement.physical_to_logical.tolist() == [[0, 1, 2, 0]]
    back = parse_pass(print_pass(p))
    assert isinstance(back, PlaceExperts)
    assert json.dumps(back.placement.to_dict()) == json.dumps(p.placement.to_dict())
    for wrong in ("[[0, 1], [2]]", "[a]", "3", '["x"]', "[none]"):
        with pytest.raises(ArgumentValueError, match="takes ndarray"):
            parse_pass(text.replace("[[0, 1, 2, 0]]", wrong))
    with pytest.raises(ArgumentValueError, match="expected"):
        parse_pass(text.replace("2, 0]]", "2]]"))


@pytest.fixture
def rules_file(tmp_path):
    (tmp_path / "helper_beside.py").write_text("EPS = 1e-6\n")
    folder = tmp_path / "my rules, mine"
    folder.mkdir()
    for path in (tmp_path / "spec_rules.py", folder / "spec_rules.py"):
        path.write_text(RULES)
    (folder / "helper_beside.py").write_text("EPS = 2e-6\n")
    (tmp_path / "broken_rules.py").write_text("1 / 0\n")
    return tmp_path / "spec_rules.py"


def test_your_own_from_a_file(rules_file, monkeypatch):
    p = parse_pass(f"{rules_file}:FuseX{{eps=1e-5}}")
    assert (p.name, p.eps) == ("fuse_x", 1e-5)
    assert parse_pass(f"{rules_file}:FuseX").eps == 1e-6
    assert type(parse_pass(f"{rules_file}:FuseX")) is type(p), "a file is loaded once"
    assert parse_pass(print_pass(p)) == p
    monkeypatch.chdir(rules_file.parent)
    assert print_pass(p) == "spec_rules.py:FuseX{eps=1e-05}"
    assert parse_pass(print_pass(p)) == p
    other = load_file(rules_file.parent / "my rules, mine" / "spec_rules.py")
    assert print_pass(other.FuseX()) == '"my rules, mine/spec_rules.py":FuseX'
    assert parse_pass(print_pass(other.FuseX())) == other.FuseX()
    assert parse_pass(print_pass(RuleSet((p,)))) == RuleSet((p,))


def test_your_own_from_a_module(rules_file, monkeypatch):
    monkeypatch.chdir(rules_file.parent)
    (rules_file.parent / "spec_module_rules.py").write_text(RULES)
    p = parse_pass("spec_module_rules:FuseX{eps=2}")
    assert repr(p.eps) == "2.0"
    assert parse_pass(print_pass(p)) == p


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fuse_swigl", ["column 1: there is no pass 'fuse_swigl'", "did you mean fuse_swiglu"]),
        ("FuseSwiGLU", ["did you mean fuse_swiglu"]),
        ("zzz", ["passes: ", "module:Class"]),
        ("fold_constants{limt=3}", ["column 16: fold_constants has no option 'limt'", "did you mean 'limit'?"]),
        ("dead_code, fold_constants{limit=x}", ["column 33: option 'limit' of fold_constants takes int, got x"]),
        ("fold_constants{limit=3.5}", ["takes int, got 3.5"]),
        ("fold_constants{limit=true}", ["takes int, got true"]),
        ("fold_constants{limit=[1]}", ["takes int, got [1]"]),
        ("rule_set{quiet=1}", ["takes bool, got 1", "true or false"]),
        ("rule_set{rules=fuse_swiglu}", ["takes tuple[Rewrite, …], got fuse_swiglu", "[first, second]"]),
        ("rule_set{rules=[dead_code]}", ["takes tuple[Rewrite, …], got [dead_code]"]),
        ("rule_set{rules=[fuse_swigl]}", ["column 17: there is no pass 'fuse_swigl'"]),
        ("quantize_weights{quantization=fp8}", ["takes Quantization, got fp8", "activations=…"]),
        ("quantize_weights{quantization={block=[1]}}", ["column 38: option 'block' of Quantization takes tuple[int"]),
        ("quantize_weights{quantization={group=0}}", ["column 31: Quantization: block (128, 128)", "group 0"]),
        ("place_experts", ["place_experts needs the option 'placement': Placement"]),
        ("fold_constants{limit=8", ["column 23: expected ',' or '}'"]),
        ("fold_constants{limit}", ["column 21: expected '=' after 'limit'"]),
        ("fold_constants{limit=}", ["column 22: expected a value, got '}'"]),
        ("fold_constants{limit=1, limit=2}", ["option 'limit' is given twice"]),
        ('no_op_shape{op="tensor}', ["expected a value"]),
        ("dead_code dead_code", ["column 11: expected ',' or the end"]),
        ("dead_code,", ["column 11: expected a value, got the end"]),
        ("", ["column 1: expected a value, got the end"]),
        ("3", ["expected the name of a pass"]),
        ("[dead_code]", ["expected the name of a pass"]),
        ("no_such_module:FuseX", ["cannot import no_such_module: ModuleNotFoundError"]),
        ("a b:FuseX", ["there is no pass 'a'"]),
        ("moec.passes:FuseSwiGL", ["moec.passes has no 'FuseSwiGL'"]),
        ("moec.passes.fuse.fuse_mlp:FuseSwiGL", ["did you mean FuseSwiGLU?"]),
        ("moec.passes:Graph", ["has no 'Graph'"]),
        ("moec.ir:Graph", ["is no Pass or Rewrite class"]),
        ("moec.passes:Rewrite", ["lacks pattern, replace()"]),
        ("no/such/file.py:FuseX", ["there is no file no/such/file.py"]),
    ],
)
def test_mistakes(text, says):
    with pytest.raises(ArgumentValueError) as e:
        parse_passes(text)
    for part in says:
        assert part in str(e.value)


def test_mistakes_in_your_own_files(rules_file):
    cases = [
        (f"{rules_file}:FuseY", "did you mean FuseX?"),
        (f"{rules_file}:Half", "lacks replace()"),
        (f"{rules_file}:nothing", "is no Pass or Rewrite class"),
        (f"{rules_file}:FuseX{{eps=small}}", "option 'eps'"),
        (f"{rules_file.parent / 'broken_rules.py'}:X", "ZeroDivisionError"),
    ]
    for text, says in cases:
        with pytest.raises(ArgumentValueError, match="column") as e:
            parse_pass(text)
        assert says in str(e.value)


def test_two_passes_where_one_is_asked_for():
    with pytest.raises(ArgumentValueError, match="holds 2 passes"):
        parse_pass("dead_code, dead_code")


def test_what_has_no_text_says_so():
    @dataclass(frozen=True)
    class Local(Pass):
        def run(self, graph: Graph) -> Graph:
            return graph

    with pytest.raises(ArgumentValueError, match="Local: it is defined inside a function"):
        print_pass(Local())
    with pytest.raises(ArgumentValueError, match="option 'anything' of Everything holds a dict"):
        print_pass(Everything(1, anything={}))
