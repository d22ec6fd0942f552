"""Pipelines: editing by name, verification after every pass, records, dumps."""

from dataclasses import dataclass

import pytest

from moec.ir import ArgumentValueError, CompileError, Quantization, TensorType, parse
from moec.passes import DeadCode, FuseMLP, FuseSwiGLU, Pass, Pipeline, build_pipeline, default_pipeline

TEXT = """graph(%x: f32[B, 4], %y: f32[B, 4]) -> (%out: f32[B, 4]) {
  %0: f32[B, 4] = math.silu(%x)
  %1: f32[B, 4] = math.mul(%0, %y)
  %2: f32[B, 4] = math.exp(%x)
  return %1
}
"""


def test_records_say_what_each_pass_did():
    graph, records = Pipeline((DeadCode(), FuseMLP())).run(parse(TEXT))
    assert [(r.name, r.nodes_before, r.nodes_after, r.fired) for r in records] == [
        ("dead_code", 3, 2, {}),
        ("fuse_mlp", 2, 1, {"fuse_swiglu": 1}),
    ]
    assert all(r.seconds > 0 for r in records)
    assert [n.op for n in graph.nodes] == ["math.swiglu"]


def test_editing_by_name():
    p = Pipeline((DeadCode(), FuseMLP()))
    assert p.insert_before("fuse_mlp", FuseSwiGLU()).names == ["dead_code", "fuse_swiglu", "fuse_mlp"]
    assert p.insert_after("fuse_mlp", FuseSwiGLU()).names == ["dead_code", "fuse_mlp", "fuse_swiglu"]
    assert p.replace_pass("dead_code", FuseSwiGLU()).names == ["fuse_swiglu", "fuse_mlp"]
    assert p.drop("dead_code").names == ["fuse_mlp"]
    assert p.names == ["dead_code", "fuse_mlp"]
    with pytest.raises(ArgumentValueError, match=r"no pass 'dead_cod'.*\n.*did you mean 'dead_code'"):
        p.drop("dead_cod")
    with pytest.raises(ArgumentValueError, match=r"write FuseMLP\(\)"):
        Pipeline((FuseMLP,))


@dataclass(frozen=True)
class Returns(Pass):
    what: object = None

    def run(self, graph):
        return self.what


@dataclass(frozen=True)
class BreaksTypes(Pass):
    def run(self, graph):
        graph = graph.clone()
        next(iter(graph.nodes)).results[0].type = TensorType("bf16", (3,))
        return graph


def test_a_wrong_pass_is_named():
    with pytest.raises(CompileError, match=r"pass returns: returned NoneType, not a Graph"):
        Pipeline((Returns(),)).run(parse(TEXT))
    with pytest.raises(CompileError, match=r"pass breaks_types: math.silu has type \(bf16\[3\]\)"):
        Pipeline((DeadCode(), BreaksTypes())).run(parse(TEXT))


def test_dump_writes_every_step(tmp_path):
    graph, _ = Pipeline((DeadCode(), FuseMLP())).run(parse(TEXT), dump=tmp_path / "d")
    assert sorted(f.name for f in (tmp_path / "d").iterdir()) == ["00_input.ir", "01_dead_code.ir", "02_fuse_mlp.ir"]
    assert parse((tmp_path / "d" / "02_fuse_mlp.ir").read_text()) == graph


def test_pipelines_from_arguments():
    plain = default_pipeline()
    assert build_pipeline(None) == plain
    assert build_pipeline([FuseSwiGLU()]).names == [*plain.names, "fuse_swiglu"]
    assert build_pipeline(None, "fp8").names[-1] == "quantize_fp8"
    assert build_pipeline(None, Quantization(group=64)).passes[-1].quantization.group == 64
    own = Pipeline((DeadCode(),))
    assert build_pipeline(own) is own
    with pytest.raises(ArgumentValueError, match="belong to the default pipeline"):
        build_pipeline(own, "fp8")
    with pytest.raises(ArgumentValueError, match="unknown quantize='fp7'"):
        build_pipeline(None, "fp7")
