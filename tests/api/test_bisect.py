"""`moec.bisect`: planted mistakes of every kind are found, named and shown again by a small graph."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moec
from moec import models
from moec.backends.reference.backend import ReferenceBackend, ReferenceExecutable
from moec.cli import app
from moec.graph_file import load_graph
from moec.ir import CompileError, DType, run
from moec.passes import DeadCode, Pipeline, QuantizeWeights, Rewrite, RuleSet, default_pipeline
from moec.passes.clean.canonicalise import RULES
from moec.passes.fuse.fuse_mlp import FuseSwiGLU
from moec.passes.rewrite import limited

from . import wrong_rules as wrong
from .samples import MLP, bind

CONFIG = dataclasses.replace(
    models.CONFIGS["mixtral-8x7b-mini"],
    num_layers=4,
    hidden_size=32,
    moe_intermediate_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    vocab_size=64,
)
IDS = (torch.arange(14) * 5 % 64).reshape(2, 7)
SHAPES = ({0: "B", 1: "S"},)


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG)


@pytest.fixture(scope="module")
def traced(model):
    return moec.trace(model, (IDS,), dynamic_shapes=SHAPES)


def among(*planted: Rewrite) -> Pipeline:
    """The planted rules in the middle of more than 20 right ones."""
    rules = tuple(r for r in RULES if r.name not in ("silu", "linear_bias"))
    assert len(rules) >= 20
    return Pipeline((DeadCode(), RuleSet((*rules[:9], *planted, *rules[9:])), DeadCode()))


def applications(graph, pipeline: Pipeline) -> list:
    with limited(None) as applied:
        pipeline.run(graph)
    return applied.applications


def again(repro: str, *, fresh: bool = False) -> tuple[int, str]:
    """(exit code, output) of the repro; `fresh`: in a process of its own."""
    program, *arguments = shlex.split(repro)
    assert program == "moec"
    if not fresh:
        done = CliRunner().invoke(app, arguments)
        return done.exit_code, done.output
    command = [sys.executable, "-c", "from moec.cli import main; main()", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


def line_of(rule: object) -> str:
    text = Path(wrong.__file__).read_text("utf-8").splitlines()
    # the decorator's line is where inspect says that a class starts
    return f"wrong_rules.py:{text.index(f'class {type(rule).__name__}(Rewrite):')}"


@pytest.mark.parametrize(
    ("rule", "location"),
    [
        (wrong.NoEpsInOneLayer(), "model.layers.3"),
        (wrong.WrongSilu(), "model.layers.0"),
        (wrong.RightThenWrong(), "model.layers.2"),
    ],
)
def test_a_wrong_rule_among_twenty_in_four_layers(traced, tmp_path, rule, location):
    pipeline = among(rule)
    all_ = applications(traced, pipeline)
    expected = next(i for i, a in enumerate(all_, 1) if a.rule == rule and a.location.under(location))
    culprit = moec.bisect(traced, (IDS,), passes=pipeline, out=tmp_path)
    assert culprit
    assert culprit.kind == "rule"
    assert culprit.culprit == rule
    assert culprit.pass_index == 1
    assert (culprit.application, culprit.applications) == (expected, len(all_))
    assert culprit.location.under(location)
    assert culprit.fault.kind == "numbers"
    assert line_of(rule) in culprit.source

    text = str(culprit)
    for part in (
        rule.name,
        culprit.source,
        f"application {expected} of {len(all_)}",
        location,
        "tolerance",
        "before (-)",
    ):
        assert part in text
    root = "math.silu" if isinstance(rule, wrong.WrongSilu) else "math.rsqrt"
    if not isinstance(rule, wrong.RightThenWrong):
        assert any(row.strip().startswith("-") and root in row for row in text.splitlines())
        assert any(row.strip().startswith("+") and root.replace("silu", "sigmoid") in row for row in text.splitlines())

    small, inputs = load_graph(tmp_path / "culprit.ir")
    assert len(small) <= 4
    assert inputs == ()
    assert not (tmp_path / "culprit.safetensors").exists()
    code, output = again(culprit.repro, fresh=isinstance(rule, wrong.NoEpsInOneLayer))
    assert code == 1, output
    assert f"rule {rule.name}" in output
    assert culprit.source in output


def test_the_default_pipeline_is_innocent(model):
    culprit = moec.bisect(model, (IDS,), dynamic_shapes=SHAPES)
    assert not culprit
    assert culprit.kind == "none"
    assert str(culprit) == "nothing is wrong: every pass keeps the meaning of the graph"


def test_appended_to_the_default_pipeline(model):
    """Wrong at sizes that the given arguments do not have."""
    culprit = moec.bisect(model, (IDS,), dynamic_shapes=SHAPES, passes=[wrong.ShortTable()], seconds=0)
    assert culprit.culprit == wrong.ShortTable()
    assert culprit.pass_index == len(default_pipeline().passes)
    sizes = culprit.fault.difference.case.binding
    assert sizes["S"] > 9
    assert f"S={sizes['S']}" in str(culprit)


# -- on a small graph ----------------------------------------------------------------------------------


@pytest.fixture
def graph():
    return bind(moec.parse(MLP.replace('loc("act"', 'loc("model.layers.1"')))


def rules_of(*rules) -> Pipeline:
    return Pipeline((RuleSet(rules),))


def test_the_first_of_two_wrong_rules_is_found(graph):
    for passes in (
        rules_of(wrong.WrongSilu(), wrong.NoEpsInOneLayer("norm")),
        Pipeline((wrong.WrongSilu(), wrong.OutOfRange(), wrong.Raises(), DeadCode())),
        Pipeline((wrong.WrongSilu(), wrong.Invalid())),
        Pipeline((wrong.WrongSilu(), wrong.WrongSilu())),
    ):
        culprit = moec.bisect(graph, passes=passes, seconds=0)
        assert culprit.culprit == wrong.WrongSilu()
        assert (culprit.pass_index, culprit.application) == (0, 1)


COSINES = """
graph(%x: f32[T]) -> (%y: f32[T]) {
  %0: i64[T] = tensor.arange() {end=T}
  %1: f32[T] = math.cast(%0) {dtype=f32}
  %2: f32[T] = math.cos(%1)
  %3: f32[T] = math.silu(%x)
  %4: f32[T] = math.add(%2, %3)
  return %4
}
"""


def test_the_first_is_found_though_only_the_second_shows_with_the_given_inputs():
    for passes in (
        Pipeline((wrong.ShortTable(), DeadCode(), wrong.WrongSilu(), DeadCode())),
        rules_of(FuseSwiGLU(), wrong.ShortTable(), wrong.WrongSilu()),
        Pipeline((DeadCode(), wrong.ShortTable(), wrong.Raises(), wrong.WhenRaises())),
    ):
        culprit = moec.bisect(moec.parse(COSINES), (torch.randn(5),), passes=passes, seconds=0)
        assert culprit.culprit == wrong.ShortTable()
        assert culprit.application == 1
        assert culprit.fault.difference.case.binding["T"] > 9


def written(text: str) -> int:
    """The line of the wrong rules that has this text."""
    lines = Path(wrong.__file__).read_text().splitlines()
    (line,) = (i for i, line in enumerate(lines, 1) if text in line)
    return line


@pytest.mark.parametrize(
    ("rule", "kind", "says"),
    [
        (wrong.Raises(), "crash", f"replace() raised KeyError in line {written('return {}[')}: 'missing'"),
        (wrong.WhenRaises(), "crash", f"when() raised ValueError in line {written('no idea')}: no idea"),
        (wrong.WrongDType(), "crash", "replace() returned f64[T, 32] for f32[T, 32]"),
        (wrong.OutOfRange(), "execution", "INDICES element is out of DATA bounds, id=99"),
    ],
)
def test_rules_that_crash(graph, tmp_path, rule, kind, says):
    culprit = moec.bisect(graph, passes=Pipeline((DeadCode(), rule)), out=tmp_path)
    assert (culprit.kind, culprit.culprit, culprit.pass_index, culprit.fault.kind) == ("rule", rule, 1, kind)
    assert culprit.application == (None if isinstance(rule, wrong.WhenRaises) else 1)
    assert says in str(culprit)
    assert line_of(rule) in str(culprit)
    assert culprit.location.under("model.layers.1")
    small, _ = load_graph(culprit.path)
    assert [n.op for n in small.nodes] == ["math.silu"]
    assert not moec.bisect(small, passes=Pipeline((DeadCode(),)))
    assert moec.bisect(small, passes=Pipeline((rule,)), seconds=0).fault.kind == kind


def test_rules_that_do_not_end(tmp_path):
    text = MLP.replace("math.silu", "math.tanh")
    culprit = moec.bisect(
        bind(moec.parse(text)), passes=rules_of(FuseSwiGLU(), wrong.Forth(), wrong.Back()), out=tmp_path
    )
    assert culprit.fault.kind == "endless"
    assert culprit.culprit in (wrong.Forth(), wrong.Back())
    assert culprit.application == 1
    small, _ = load_graph(culprit.path)
    assert len(small) == 1
    code, output = again(culprit.repro)
    assert code == 1, output
    assert "do not terminate" in output


@pytest.mark.parametrize(
    ("p", "kind"),
    [
        (wrong.Invalid(), "invalid"),
        (wrong.Mutates(), "input changed"),
        (wrong.DropsOutput(), "signature"),
        (wrong.ForgetsReturn(), "crash"),
        (wrong.Counts(), "crash"),
    ],
)
def test_passes_that_are_no_rules(graph, p, kind):
    culprit = moec.bisect(graph, passes=Pipeline((DeadCode(), p, DeadCode())))
    assert (culprit.kind, culprit.culprit, culprit.pass_index, culprit.fault.kind) == ("pass", p, 1, kind)
    assert culprit.application is None
    assert "wrong_rules.py" in str(culprit)
    assert culprit.minimised is not None
    assert culprit.repro.startswith("moec.bisect(" if isinstance(p, wrong.Counts) else "moec bisect ")
    assert len(culprit.minimised.graph) <= 1


def test_only_visible_with_the_given_inputs(graph, tmp_path):
    x = 1000 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    graph.bind_weights({"norm": torch.full((16,), 200.0)})
    culprit = moec.bisect(graph, (x, torch.arange(5)), passes=Pipeline((wrong.Clamped(),)), out=tmp_path)
    assert culprit.culprit == wrong.Clamped()
    assert (tmp_path / "culprit.safetensors").exists()
    _, inputs = load_graph(tmp_path / "culprit.ir")
    assert float(inputs[0].abs().max()) > 50
    code, output = again(culprit.repro, fresh=True)
    assert code == 1, output
    (tmp_path / "culprit.safetensors").unlink()
    assert again(culprit.repro)[0] == 0, "it is the captured numbers that show it"


def test_overflow_in_its_own_dtype(tmp_path):
    text = MLP.replace("f32", "f16")
    culprit = moec.bisect(bind_half(text), passes=Pipeline((wrong.Overflows(),)), out=tmp_path)
    assert culprit.culprit == wrong.Overflows()
    assert "overflows in float16" in str(culprit)
    assert len(culprit.minimised.graph) == 1


def bind_half(text):
    graph = moec.parse(text)
    for name, v in graph.weights.items():
        graph.bind_weights({name: torch.ones(v.shape, dtype=torch.float16)})
    return graph


def test_quantising_is_no_fault_but_a_wrong_scale_is(graph):
    fp8 = QuantizeWeights(moec.Quantization(block=(16, 16), group=16))
    culprit = moec.bisect(graph, passes=Pipeline((DeadCode(), fp8, DeadCode())))
    assert not culprit
    assert "quantize_weights quantises" in str(culprit)
    culprit = moec.bisect(graph, passes=Pipeline((fp8, wrong.WrongSilu())), seconds=0)
    assert culprit.culprit == wrong.WrongSilu(), "what follows is held against the quantised graph"
    culprit = moec.bisect(graph, passes=Pipeline((fp8, wrong.WrongCodes())))
    assert culprit.culprit == wrong.WrongCodes()
    assert [n.op for n in culprit.minimised.graph.nodes] == ["quant.quantize"], "codes may be outputs"
    culprit = moec.bisect(graph, passes=Pipeline((wrong.WrongScale(),)), seconds=0)
    assert (culprit.kind, culprit.culprit) == ("pass", wrong.WrongScale())
    assert "of its norm" in str(culprit)


def test_a_rule_inside_a_function_is_shown_in_python(graph, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Local(wrong.WrongSilu):
        """Wrong, and nowhere to be found."""

    culprit = moec.bisect(graph, passes=Pipeline((Local(),)), out=tmp_path)
    assert culprit.culprit == Local()
    assert "it is defined inside a function" in str(culprit)
    assert culprit.repro.startswith("moec.bisect(*moec.graph_file.load_graph(")
    code = culprit.repro.replace(repr(Local()), "Local()")
    assert eval(code, {"moec": moec, "Local": Local}).culprit == Local()


def test_without_a_folder_the_graph_is_in_the_text(graph):
    culprit = moec.bisect(graph, passes=Pipeline((wrong.WrongSilu(),)))
    assert culprit.path is None
    assert "math.silu(%x0)" in str(culprit)
    assert moec.parse(str(culprit.minimised.graph))
    assert "out=folder" in str(culprit)


class Perturbed(ReferenceExecutable):
    def run(self, inputs):
        return run(self.graph, inputs, tap=self.perturb)

    def tap(self, inputs, values):
        seen = {}
        run(self.graph, inputs, tap=lambda v, t: seen.setdefault(v, self.perturb(v, t, seen)))
        return {v: seen[v] for v in values if v in seen}

    @staticmethod
    def perturb(value, tensor, seen=None):
        return tensor * 1.01 if value.producer is not None and value.producer.op == "math.silu" else tensor


class PerturbedBackend(ReferenceBackend):
    def compile(self, graph, *, threads=None, options=None):
        return Perturbed(graph)


def test_the_backend_is_to_blame(graph):
    backend = PerturbedBackend("perturbed", dtypes=frozenset(DType))
    culprit = moec.bisect(graph, backend=backend, passes=Pipeline((DeadCode(),)))
    assert (culprit.kind, culprit.name) == ("backend", "perturbed")
    assert culprit.divergence.node.op == "math.silu"
    assert "perturbed first diverges at math.silu" in str(culprit)
    assert [n.op for n in culprit.minimised.graph.nodes] == ["math.silu"]
    assert culprit.repro == (
        "moec.bisect(*moec.graph_file.load_graph('culprit.ir'), passes=moec.passes.Pipeline(), backend=…)"
    )
    culprit = moec.bisect(graph, backend=backend, passes=Pipeline((wrong.WrongSilu(),)), seconds=0)
    assert culprit.culprit == wrong.WrongSilu(), "passes come first"
    assert not moec.bisect(graph, backend="onnxruntime", passes=Pipeline((DeadCode(),)))


def test_a_lowering_that_raises_is_the_backends(graph, tmp_path, monkeypatch):
    from moec.backends.onnxruntime import backend

    def broken(*operands):
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(backend.lowerings, "math.silu", broken)
    culprit = moec.bisect(graph, backend="onnxruntime", passes=Pipeline((DeadCode(),)), out=tmp_path)
    assert (culprit.kind, culprit.name, culprit.fault.kind) == ("backend", "onnxruntime", "crash")
    assert "math.silu" in [n.op for n in culprit.minimised.graph.nodes]
    assert len(culprit.minimised.graph) == 1
    assert culprit.repro == f"moec bisect {tmp_path}/culprit.ir --no-default --backend onnxruntime"
    code, output = again(culprit.repro)
    assert code == 1, output
    assert "backend onnxruntime" in output
    monkeypatch.undo()
    assert again(culprit.repro)[0] == 0


def test_a_traced_graph_that_does_not_run_is_an_error():
    text = MLP.replace("return %3, %keep", "%4: i64[1] = tensor.constant() {value=[9], type=i64[1]}\n"
                       "  %5: f32[T, 1] = tensor.gather(%3, %4) {axis=-1}\n  return %5, %keep").replace(
        "%y: f32[T, 8]", "%y: f32[T, 1]")  # fmt: skip
    with pytest.raises(CompileError, match="out of DATA bounds"):
        moec.bisect(bind(moec.parse(text)), passes=Pipeline((DeadCode(),)))


def test_bad_arguments(graph):
    with pytest.raises(CompileError, match="is not a Pass"):
        moec.bisect(graph, passes=[wrong.WrongSilu])
    with pytest.raises(CompileError, match="missing arguments: keep"):
        moec.bisect(graph, (torch.ones(2, 16),), passes=Pipeline((DeadCode(),)))
