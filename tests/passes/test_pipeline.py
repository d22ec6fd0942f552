"""Pipelines: editing by name, verification after every pass, records, dumps."""

import json
import re
from dataclasses import dataclass

import pytest
import torch

from moec.ir import ArgumentValueError, CompileError, Quantization, TensorType, Weight, parse
from moec.passes import (
    Analysis,
    DeadCode,
    FuseMLP,
    FuseSwiGLU,
    Pass,
    Phase,
    Pipeline,
    Rewrite,
    build_pipeline,
    default_pipeline,
)

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
    with pytest.raises(CompileError, match=r"pass returns \(.*\): returned NoneType, not a Graph"):
        Pipeline((Returns(),)).run(parse(TEXT))
    with pytest.raises(CompileError, match=r"pass breaks_types \(.*\): math.silu has type \(bf16\[3\]\)"):
        Pipeline((DeadCode(), BreaksTypes())).run(parse(TEXT))


@dataclass(frozen=True)
class ChangesItsInput(Pass):
    how: str

    def run(self, graph):
        after = graph.clone()
        node = next(iter(graph.nodes))
        if self.how == "attribute":
            graph.find("exp")[0].attrs["nothing"] = 1
        elif self.how == "operand":
            graph.replace_operand(node, 0, graph.inputs[1])
        elif self.how == "type":
            node.results[0].type = TensorType("bf16", (3,))
        elif self.how == "node":
            graph.create("math.neg", [graph.inputs[0]])
        elif self.how == "output":
            graph.set_output(0, graph.inputs[0])
        elif self.how == "weight":
            graph.bind_weights({"w": torch.zeros(4)})
        return after


@pytest.mark.parametrize("how", ["attribute", "operand", "type", "node", "output", "weight"])
def test_a_pass_that_changes_its_input_is_named_with_its_line(how):
    message = r"pass changes_its_input \(.*test_pipeline\.py:\d+\): changed its input graph"
    graph = parse(TEXT)
    graph.add_weight(Weight.of("w", torch.ones(4)))
    with pytest.raises(CompileError, match=message):
        Pipeline((ChangesItsInput(how),)).run(graph)


def test_a_rule_after_which_the_graph_is_invalid_names_its_line():
    class BreaksAUser(Rewrite):
        def pattern(self, p, x):
            return p.exp(x)

        def replace(self, b, m):
            m.root.users[0].attrs["approximate"] = "no"
            return b.neg(m.x)

    text = TEXT.replace("  return %1", "  %3: f32[B, 4] = math.gelu(%2)\n  return %3")
    with pytest.raises(CompileError, match=r"pass breaks_a_user \(.*test_pipeline\.py:\d+\): math\.gelu"):
        Pipeline((BreaksAUser(),)).run(parse(text))


def test_an_exception_in_a_pass_names_its_line():
    @dataclass(frozen=True)
    class Crashes(Pass):
        def run(self, graph):
            return graph.nodez

    with pytest.raises(CompileError, match=r"pass crashes \(.*test_pipeline\.py:\d+\): raised AttributeError.*nodez"):
        Pipeline((Crashes(),)).run(parse(TEXT))


def test_a_rule_that_comes_too_late_is_told_its_place():
    late = Pipeline((Phase("fuse", (FuseMLP(), DeadCode())), FuseSwiGLU(), FuseSwiGLU(max=0)))
    _, records = late.run(parse(TEXT))
    assert [bool(r.unfired) for r in records] == [False, False, True, False]
    assert "it matches before fuse.fuse_mlp: Pipeline.insert_before('fuse.fuse_mlp', …)" in records[2].unfired
    _, records = Pipeline((DeadCode(), FuseSwiGLU())).run(parse(TEXT.replace("silu", "neg")))
    assert records[1].unfired
    assert "it matches before" not in records[1].unfired
    _, records = Pipeline((FuseSwiGLU(), FuseSwiGLU(max=1))).run(parse(TEXT))
    assert not records[1].unfired  # it has done its work
    dead = TEXT.replace("return %1", "return %2")
    _, records = Pipeline((DeadCode(), FuseSwiGLU())).run(parse(dead))
    assert "it matches before" not in records[1].unfired


@dataclass(frozen=True)
class CountOps(Analysis):
    op: str = "math.silu"

    def run(self, graph):
        return len(graph.find(self.op))


def test_an_analysis_leaves_the_graph_and_its_result_in_the_record():
    graph = parse(TEXT)
    after, records = Pipeline((CountOps(), FuseMLP(), CountOps())).run(graph)
    assert [r.result for r in records] == [1, None, 0]
    assert records[0].to_dict()["result"] == "1"
    assert [n.op for n in after.nodes] == ["math.swiglu", "math.exp"]


def phased():
    return Pipeline((Phase("clean", (DeadCode(), FuseMLP())), FuseSwiGLU(), Phase("tidy", (DeadCode(),))))


def test_phases():
    p = phased()
    assert p.phases == ["clean", "tidy"]
    assert p.names == ["dead_code", "fuse_mlp", "fuse_swiglu", "dead_code"]
    _, records = p.run(parse(TEXT))
    assert [(r.phase, r.name) for r in records] == [
        ("clean", "dead_code"), ("clean", "fuse_mlp"), ("", "fuse_swiglu"), ("tidy", "dead_code"),
    ]  # fmt: skip
    count = CountOps()
    assert p.insert_before("tidy", count).names == [*p.names[:3], "count_ops", "dead_code"]
    assert p.insert_after("clean", count).steps[1] == count
    assert p.insert_after("fuse_mlp", count).steps[0] == Phase("clean", (DeadCode(), FuseMLP(), count))
    assert p.insert_before("tidy.dead_code", count).steps[2].passes == (count, DeadCode())
    assert p.extend_phase("clean", count).steps[0].passes == (DeadCode(), FuseMLP(), count)
    assert p.drop("dead_code").names == ["fuse_mlp", "fuse_swiglu"]
    assert p.drop("tidy.dead_code").names == p.names[:3]
    assert p.drop("clean").names == ["fuse_swiglu", "dead_code"]
    assert p.replace_pass("clean", count).names == ["count_ops", "fuse_swiglu", "dead_code"]
    assert p.names == phased().names


def test_places_that_are_not_clear():
    with pytest.raises(ArgumentValueError, match=r"occurs 2 times.*\n.*clean\.dead_code or tidy\.dead_code"):
        phased().insert_before("dead_code", CountOps())
    with pytest.raises(ArgumentValueError, match=r"no phase 'fuse_mlp'.*\n.*phases: clean, tidy"):
        phased().extend_phase("fuse_mlp", CountOps())
    with pytest.raises(ArgumentValueError, match="two phases are called a"):
        Pipeline((Phase("a"), Phase("a")))
    with pytest.raises(ArgumentValueError, match=r"write DeadCode\(\)"):
        Phase("a", (DeadCode,))
    with pytest.raises(ArgumentValueError, match=r"occurs 2 times.*\n.*edit its `steps`"):
        Pipeline((DeadCode(), DeadCode())).insert_before("dead_code", CountOps())
    names = default_pipeline("fp8").phases
    assert names == ["clean", "fuse", "tidy", "quantize"]


def test_dump_writes_every_step(tmp_path):
    folder = tmp_path / "d"
    graph, _ = Pipeline((DeadCode(), FuseMLP(), CountOps())).run(parse(TEXT), dump=folder)
    assert sorted(f.name for f in folder.iterdir()) == [
        "00_input.ir", "01_dead_code.diff", "01_dead_code.ir", "02_fuse_mlp.diff", "02_fuse_mlp.ir",
        "03_count_ops.ir", "replay.html",
    ]  # fmt: skip
    assert parse((folder / "02_fuse_mlp.ir").read_text()) == graph
    assert (folder / "02_fuse_mlp.diff").read_text().splitlines() == [
        " graph(%x: f32[B, 4], %y: f32[B, 4])",
        "-  %0: f32[B, 4] = math.silu(%x)",
        "-  %1: f32[B, 4] = math.mul(%0, %y)",
        "-  return out = %1: f32[B, 4]",
        "+  %3: f32[B, 4] = math.swiglu(%x, %y)",
        "+  return out = %3: f32[B, 4]",
    ]
    Pipeline((DeadCode(),)).run(parse(TEXT), dump=folder)  # nothing of the longer run stays
    assert sorted(f.name for f in folder.iterdir()) == [
        "00_input.ir", "01_dead_code.diff", "01_dead_code.ir", "replay.html",
    ]  # fmt: skip


def test_a_dump_into_a_file_is_refused(tmp_path):
    (tmp_path / "d").touch()
    for folder in (tmp_path / "d", tmp_path / "d" / "e"):
        with pytest.raises(ArgumentValueError, match=f"cannot dump into {re.escape(str(folder))}"):
            Pipeline((DeadCode(),)).run(parse(TEXT), dump=folder)


def test_a_dump_holds_what_came_before_a_failure(tmp_path):
    with pytest.raises(CompileError, match="pass returns"):
        Pipeline((FuseMLP(), Returns())).run(parse(TEXT), dump=tmp_path)
    assert parse((tmp_path / "01_fuse_mlp.ir").read_text()).find("swiglu")
    assert (tmp_path / "replay.html").exists()


LONG = """graph(%x: f32[B, 4]) -> (%out: f32[B, 4]) {{
{body}
  return %{last}
}}
"""


def test_a_diff_shows_only_what_changed(tmp_path):
    """Equal constants, renumbered values and moved nodes are no differences."""
    ops = ["silu"] + ["neg", "exp"] * 20
    body = [f"  %{i}: f32[B, 4] = math.{op}(%{i - 1 if i else 'x'})" for i, op in enumerate(ops)]
    last = len(ops) - 1
    tail = [
        f"  %{last + 1}: f32[] = tensor.constant() {{value=[2.0], type=f32[]}}",
        f"  %{last + 2}: f32[] = tensor.constant() {{value=[2.0], type=f32[]}}",
        f"  %{last + 3}: f32[B, 4] = math.mul(%{last}, %{last + 1})",
        f"  %{last + 4}: f32[B, 4] = math.mul(%{last + 3}, %{last + 2})",
        f"  %{last + 5}: f32[B, 4] = math.relu(%{last + 4})",
    ]
    graph = parse(LONG.format(body="\n".join(body + tail), last=last + 5))
    r = type("Twice", (Rewrite,), {
        "pattern": lambda s, p, x: p.relu(x), "replace": lambda s, b, m: b.neg(b.exp(m.x)),
    })()  # fmt: skip
    Pipeline((DeadCode(), r)).run(graph, dump=tmp_path)
    assert not (tmp_path / "01_dead_code.diff").exists()
    changed = [line for line in (tmp_path / "02_twice.diff").read_text().splitlines() if line[0] in "+-"]
    assert len(changed) == 5  # relu out; exp and neg in; the output
    data = re.search(r'application/json">(.*?)</script>', (tmp_path / "replay.html").read_text(), re.S)
    steps = json.loads(data[1])["steps"]
    assert [s["marks"].strip().count("+") for s in steps] == [0, 3]
    assert [s["name"] for s in steps] == ["dead_code", "twice"]


def test_a_diff_keeps_the_name_of_a_traced_value(tmp_path):
    graph = parse(TEXT)
    graph.outputs[0].origins = frozenset({"mul_3"})
    Pipeline((FuseMLP(),)).run(graph, dump=tmp_path)
    assert "+  %1: f32[B, 4] = math.swiglu(%x, %y)" in (tmp_path / "01_fuse_mlp.diff").read_text().splitlines()


def test_the_replay_page_holds_no_markup_of_the_model(tmp_path):
    graph = parse(TEXT.replace("%x", '%"</script><b>"'))
    Pipeline((DeadCode(),)).run(graph, dump=tmp_path)
    text = (tmp_path / "replay.html").read_text()
    assert text.count("</script>") == 2
    assert "http" not in text


def test_pipelines_from_arguments():
    plain = default_pipeline()
    assert build_pipeline(None) == plain
    assert build_pipeline([FuseSwiGLU()]).names == [*plain.names, "fuse_swiglu"]
    assert build_pipeline(None, "fp8").names[-1] == "quantize_weights"
    assert build_pipeline(None, Quantization(group=64)).passes[-1].quantization.group == 64
    assert build_pipeline(FuseSwiGLU()) == build_pipeline([FuseSwiGLU()])
    assert Pipeline(Phase("a", DeadCode())) == Pipeline((Phase("a", (DeadCode(),)),))
    own = Pipeline((DeadCode(),))
    assert build_pipeline(own) is own
    with pytest.raises(ArgumentValueError, match="belong to the default pipeline"):
        build_pipeline(own, "fp8")
    with pytest.raises(ArgumentValueError, match="unknown quantize='fp7'"):
        build_pipeline(None, "fp7")
