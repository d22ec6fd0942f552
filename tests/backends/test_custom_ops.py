"""Ops and lowerings from outside of moec: they run on every backend, and what is missing is said."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import moec
from moec.backends.onnxruntime import backend as onnxruntime
from moec.backends.triton import backend as triton
from moec.ir import Attr, Builder, CompileError, Dim, Graph, Operand, OptionalOperand, TensorType, op
from moec.testing import assert_backends_agree

from .custom_ops import agree, cap_onnx, cap_triton, declare_cap, graph_of, refused

HERE = r"test_custom_ops\.py:\d+"


@pytest.fixture(autouse=True)
def cap():
    return declare_cap()


# -- they run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_an_elementwise_op_runs_on_every_backend(cap, dtype):
    onnxruntime.lowers("test.cap")(cap_onnx)
    triton.lowers("test.cap")(cap_triton)
    agree("test.cap", dtype, cap=2.5)


def test_it_joins_the_generated_kernel(cap):
    triton.lowers("test.cap")(cap_triton)
    compiled = moec.compile(graph_of("test.cap", cap=2.0), backend="triton")
    stats = compiled.program.executable.stats
    assert (stats["kernels"], stats["fused_nodes"]) == ({"elementwise": 1}, 3)
    for rows in (0, 1, 5):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(compiled(x)[0], -torch.tanh(x.exp() / 2) * 2)


def test_infinite_attributes_are_numbers_of_an_expression():
    @op("test.largest", elementwise=True)
    class Largest:
        x: Operand
        limit: Attr[float] = -math.inf

        def infer(self):
            return self.x

        def reference(self):
            return torch.clamp(self.x, max=self.limit)

    triton.lowers("test.largest")(lambda op: f"smaller({op.x}, tl.zeros_like({op.x}) + {op.limit})")
    for limit in (math.inf, -math.inf, 2.0):
        g = graph_of("test.largest", limit=limit)
        x = torch.randn(3, 6)
        torch.testing.assert_close(moec.compile(g, backend="triton")(x)[0], -torch.clamp(x.exp(), max=limit))


def test_absent_operands_and_several_results():
    @op("test.shift", results=2)
    class Shift:
        x: Operand
        bias: OptionalOperand

        def infer(self):
            return self.x, self.x.with_dtype("bool")

        def reference(self):
            y = self.x if self.bias is None else self.x + self.bias
            return y, y > 0

    @onnxruntime.lowers("test.shift")
    def _(e, node):
        x, bias = e.operands(node)
        y = e.op("Identity", x) if bias is None else e.op("Add", x, bias)
        return y, e.op("Greater", y, np.float32(0))

    @triton.lowers("test.shift")
    def _(op):
        y = op.x.clone() if op.bias is None else op.x + op.bias
        return [y, y > 0]

    for count in (1, 2):
        g = Graph("g")
        xs = [g.add_input(f"x{i}", TensorType("f32", (Dim("T"), 3))) for i in range(count)]
        for r in Builder(g).op("test.shift", xs):
            g.add_output(r)
        inputs = tuple(torch.randn(4, 3) for _ in xs)
        assert_backends_agree(g, inputs, backends=("reference", "onnxruntime", "triton"))


def test_one_percent_is_noticed(cap):
    onnxruntime.lowers("test.cap")(lambda e, n: e.op("Mul", cap_onnx(e, n), np.float32(1.01)))
    triton.lowers("test.cap")(cap_triton)
    with pytest.raises(AssertionError, match="onnxruntime"):
        agree("test.cap", cap=2.5)


def test_a_shipped_op_can_be_lowered_anew():
    triton.lowers("math.softmax")(lambda op: torch.softmax(op.x, op.axis) * 0 + 7)
    triton.lowers("norm.rms")(lambda op: op.weight.expand(op.x.shape).contiguous())
    triton.lowers("math.silu")(lambda op: f"{op.x} * 0 + 5.0")
    g = Graph("g")
    b = Builder(g)
    x, w = g.add_input("x", TensorType("f32", (2, 3))), g.add_input("w", TensorType("f32", (3,)))
    for v in (b.softmax(x, axis=-1), b.rms(x, w), b.silu(x)):
        g.add_output(v)
    softmax, rms, silu = moec.compile(g, backend="triton")(torch.randn(2, 3), torch.arange(3.0))
    assert softmax.unique().tolist() == [7]
    assert rms[0].tolist() == [0, 1, 2]
    assert silu.unique().tolist() == [5]


def declare_twice(**more):
    """A notebook cell: the same class, edited."""

    class Twice:
        x: Operand
        by: Attr[float]

        def infer(self):
            return self.x

        def reference(self):
            return self.x * 0 + self.by

    Twice.__annotations__ |= more
    for name in more:
        setattr(Twice, name, True)
    return op("test.twice")(Twice).opdef


def test_declared_again_it_is_the_new_one():
    """Rules and graphs that knew the op see its new definition."""
    from moec.passes import Rewrite

    class Fuse(Rewrite):
        def pattern(self, p, x):
            return p.neg(p.op("test.twice", [x], {"by": p.attr("by")}))

        def replace(self, b, m):
            return b.op("test.twice", [m.x], {"by": -m.by})

    first = declare_twice()
    old = graph_of("test.twice", by=2.0)
    assert Fuse().run(old).find("test.twice")[0].attrs == {"by": -2.0}
    assert declare_twice(sharp="Attr[bool]") is first
    new = graph_of("test.twice", by=2.0, sharp=False)
    assert Fuse().run(new) == new  # an attribute that the pattern leaves out is its default, True
    new = Fuse().run(graph_of("test.twice", by=2.0))
    assert new.find("test.twice")[0].attrs == {"by": -2.0, "sharp": True}
    assert moec.compile(new, backend="reference")(torch.zeros(1, 6))[0].unique().tolist() == [-2.0]


def test_a_clash_says_where_the_first_is(tmp_path):
    source = "from moec.ir import Operand, op\n\n\n@op('math.silu')\nclass Silu:\n    x: Operand\n" + textwrap.indent(
        "def infer(self): return self.x\ndef reference(self): return self.x\n", "    "
    )
    (tmp_path / "clash.py").write_text(source)
    # text annotations, as this file has them
    with pytest.raises(CompileError, match=r"\(.*clash\.py:\d+\) is already declared at .*elementwise\.py:\d+"):
        exec(compile(source, tmp_path / "clash.py", "exec"), {"__name__": "clash"})


# -- neither lowering nor decomposition ---------------------------------------------------------------


def test_without_a_lowering_it_says_what_to_write(cap):
    for name in ("onnxruntime", "triton"):
        text = refused(name, "unsupported-op")
        assert f"test.cap cannot run on {name}: {name} has no lowering of test.cap" in text
        assert f"write @backend.lowers('test.cap') with the `backend` of moec.backends.{name}" in text
        assert "or decompose(self, b) in the op's class" in text
        assert "custom_ops.py:" in text
        assert 'fallback="reference"' in text


def test_the_place_in_the_model_is_named(cap):
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    from moec.passes import Rewrite

    class Fuse(Rewrite):
        def pattern(self, p, x):
            return p.tanh(x)

        def replace(self, b, m):
            return b.op("test.cap", [m.x], {"cap": 1.0})

    with pytest.raises(CompileError, match=rf"test\.cap cannot run on onnxruntime(?s:.*)at tests/backends/{HERE}"):
        moec.compile(Model(), (torch.zeros(2),), backend="onnxruntime", passes=[Fuse()])


@pytest.mark.parametrize("name", ["onnxruntime", "triton"])
def test_the_reference_may_run_it(cap, name):
    compiled = moec.compile(graph_of("test.cap", cap=3.0), backend=name, fallback="reference")
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(x)[0], -torch.tanh(x.exp() / 3) * 3)
    assert [f.op for f in compiled.program.fallbacks] == ["test.cap"]


def test_what_a_check_refuses_is_decomposed_or_an_error(cap):
    onnxruntime.lowers("test.cap", check=lambda n: None if n.result.dtype == "f32" else "f32 only")(cap_onnx)
    moec.compile(graph_of("test.cap", cap=3.0), backend="onnxruntime")
    with pytest.raises(CompileError, match=r"test\.cap cannot run on onnxruntime: f32 only"):
        moec.compile(graph_of("test.cap", "f64", cap=3.0), backend="onnxruntime")
    cap.decompose = lambda self, b: b.mul(b.tanh(b.div(self.x, self.cap)), self.cap)
    compiled = moec.compile(graph_of("test.cap", "f64", cap=3.0), backend="onnxruntime")
    assert compiled.program.legal.find("math.tanh")


# -- registering --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [onnxruntime, triton], ids=lambda b: b.name)
def test_unknown_ops_and_forgotten_names(cap, backend):
    with pytest.raises(CompileError, match=r"a lowering for \w+: unknown op 'test\.cpa'(?s:.*)did you mean test\.cap"):
        backend.lowers("test.cpa")
    with pytest.raises(CompileError, match=r'unknown op .*(?s:.*)declare it first, @moec\.ir\.op\("zzzz\.qqqq"\)'):
        backend.lowers("zzzz.qqqq")
    with pytest.raises(CompileError, match=r"lowers\(\) takes op names, got <function"):
        backend.lowers(cap_onnx)


# -- saving -------------------------------------------------------------------------------------------

MODULE = """
import torch
from moec.backends.onnxruntime import backend
from moec.ir import Attr, Operand, op
from moec.passes import Rewrite

@op("test.saved")
class Saved:
    x: Operand
    def infer(self): return self.x
    def reference(self): return torch.tanh(self.x) * 2

@backend.lowers("test.saved")
def _(e, node):
    y = e.op("Tanh", *e.operands(node))
    return e.op("Add", y, y)

class Fuse(Rewrite):
    def pattern(self, p, x): return p.mul(p.tanh(x), 2.0)
    def replace(self, b, m): return b.saved(m.x)
"""
SAVE = """
import moec, torch, saved_op
class Model(torch.nn.Module):
    def forward(self, x): return torch.tanh(x) * 2.0
for name in ("onnxruntime", "reference"):
    compiled = moec.compile(Model(), (torch.zeros(3),), backend=name, passes=[saved_op.Fuse()])
    assert compiled.graph.find("saved")
    compiled.save(name)
"""
LOAD = """
import moec, torch
for name in ("onnxruntime", "reference"):
    try:
        moec.load(name)
    except moec.ArtifactError as error:
        assert "the model uses the op test.saved, which nothing has declared" in str(error), error
        assert "before moec.load; it was 'saved_op'" in str(error), error
    else:
        raise AssertionError("loaded")
import saved_op
for name in ("onnxruntime", "reference"):
    torch.testing.assert_close(moec.load(name)(torch.ones(3)), torch.tanh(torch.ones(3)) * 2)
from moec.backends.onnxruntime import backend
del backend.lowerings["test.saved"]
try:
    moec.load("onnxruntime")
except moec.CompileError as error:
    assert "test.saved cannot run on onnxruntime" in str(error), error
"""


def test_a_saved_model_asks_for_its_op(tmp_path):
    (tmp_path / "saved_op.py").write_text(MODULE)
    for code in (SAVE, LOAD):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
