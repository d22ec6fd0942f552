"""QuantizeWeights with integers: which weights, as what, in which blocks; and what a plan refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.ir import ArgumentValueError, Builder, CompileError, Dim, DType, Graph, Quantization, TensorType, Weight, run
from moec.ir.ops.block_codes import dequantize_blocks, quantize_blocks
from moec.ir.weight import BlockScaledSource
from moec.passes import default_pipeline
from moec.passes.coverage import quantized_coverage
from moec.passes.pipeline import run_pass
from moec.passes.quantize import QuantizeWeights

from .placement_cases import builder, moe_graph

INT8, INT4 = Quantization.of("int8"), Quantization.of("int4")
BLOCK = (1, 16)


def plan(weights: str, **fields: object) -> Quantization:
    return Quantization(weights, None, **{"block": BLOCK, **fields})


def rounded(x: torch.Tensor, dtype: str, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    return dequantize_blocks(*quantize_blocks(x, block, DType.of(dtype)), block)


def linear_graph(weight: torch.Tensor, rank: int = 2) -> Graph:
    g = Graph()
    x = g.add_input("x", TensorType(DType.of(weight.dtype), (*[Dim("T"), 3, 2][: rank - 1], weight.shape[1])))
    bias = g.add_weight(Weight.of("bias", torch.ones(weight.shape[0], dtype=weight.dtype)))
    g.add_output(builder(g, "proj").linear(x, g.add_weight(Weight.of("proj.weight", weight)), bias))
    return g


@pytest.mark.parametrize("weights", ["i8", "i4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 15), (16, 16), (3, 100)])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_linear_is_dequantise_then_linear(weights, dtype, shape, tokens):
    w, x = torch.randn(shape).to(dtype), torch.randn(tokens, 3, shape[1]).to(dtype)
    q = QuantizeWeights(plan(weights)).run(linear_graph(w, rank=3))
    q.verify()
    (got,) = run(q, [x])
    assert torch.equal(got, F.linear(x, rounded(w, weights).to(dtype), torch.ones(shape[0], dtype=dtype)))
    assert q.weights["proj.weight.codes"].type == TensorType(weights, shape)
    assert "proj.weight" not in q.weights
    if tokens and min(shape) > 1:
        assert not torch.equal(got, F.linear(x, w, torch.ones(shape[0], dtype=dtype)))


@pytest.mark.parametrize("weights", ["i8", "i4"])
@pytest.mark.parametrize("block", [(1, 16), (4, 32), (1, 128)])
@pytest.mark.parametrize("options", [{}, {"biases": True, "limit": 0.7, "interleaved": True}, {"experts": 2}])
def test_experts_compute_on_rounded_weights(weights, block, options):
    """Against the same graph with rounded weights in f32. Interleaved rows are put side by side before blocks of
    several rows are formed."""
    g = moe_graph(layers=1, d=40, f=12, **options)
    q = QuantizeWeights(plan(weights, block=block, keep=("lm_head", "layers.0.proj"), min_coverage=0)).run(g)
    q.verify()
    (node,) = g.find("moe.experts")
    for name in ("gate_up", "down"):
        value = node.operand(name)
        x = value.weight.load()
        order = torch.arange(x.shape[1])
        if name == "gate_up" and options.get("interleaved"):
            order = torch.cat([order[0::2], order[1::2]])
        back = torch.empty_like(x)
        back[:, order] = rounded(x[:, order], weights, block)
        assert not torch.equal(back, x)
        value.weight = Weight.of(value.weight.name, back)
    x = torch.randn(9, 40)
    torch.testing.assert_close(run(q, [x]), run(g, [x]), rtol=1e-5, atol=1e-5)


def test_a_transposed_weight_is_covered():
    """As GPT-OSS stores its experts."""
    g = moe_graph(layers=1, d=32, f=16)
    (node,) = g.find("moe.experts")
    for i, name in ((3, "gate_up"), (4, "down")):
        stored = node.operand(name).weight
        turned = g.add_weight(Weight.of(f"{name}.T", stored.load().transpose(1, 2).contiguous()))
        g.replace_operand(node, i, Builder(g, before=node).transpose(turned, perm=(0, 2, 1)))
    after, _ = default_pipeline("int4").run(g)
    assert quantized_coverage(after).by_dtype["i4"] > 0
    (new,) = after.find("quant.scaled_experts")
    want = quantize_blocks(moe_graph(layers=1, d=32, f=16).weights["layers.0.down"].weight.load(), (1, 32), DType.I4)
    got = new.operand("down").weight.load(), new.operand("down_scale").weight.load()
    assert torch.equal(got[0].view(torch.int8), want[0].view(torch.int8))
    assert torch.equal(got[1], want[1])


def test_named_plans():
    assert (INT8.weights, INT8.activations, INT8.keep, INT8.in_i8) == ("i8", None, (), ())
    assert (INT4.weights, INT4.activations, INT4.keep, INT4.in_i8) == ("i4", None, (), ("lm_head",))
    assert Quantization.of("fp8") == Quantization()
    assert Quantization().keep == ("lm_head",)


def test_what_stays_and_what_is_i8():
    q, record = run_pass(QuantizeWeights(plan("i4")), moe_graph())
    coverage = quantized_coverage(q)
    assert {x.weight: x.reason for x in coverage.left} == {
        "layers.0.gate.weight": "router projection",
        "layers.1.gate.weight": "router projection",
    }
    assert coverage.by_dtype == {"i8": 4 * 32 * 16, "i4": coverage.quantised_bytes - 4 * 32 * 16}
    assert record.figures["by_dtype"] == coverage.by_dtype
    assert "i8 2,048" in str(coverage)
    assert q.weights["lm_head.weight.codes"].dtype is DType.I8
    other = QuantizeWeights(plan("i4", in_i8=("layers.1",), keep=("lm_head",))).run(moe_graph())
    dtypes = {n: v.dtype for n, v in other.weights.items() if n.endswith("codes")}
    assert {n for n, d in dtypes.items() if d is DType.I8} == {n for n in dtypes if n.startswith("layers.1")}
    assert "lm_head.weight" in other.weights


def test_a_tied_table_and_two_users():
    """The embedding reads the table as it is; a weight that two layers store as i8 and i4 is stored in both."""
    g = Graph()
    ids = g.add_input("ids", TensorType("i64", (Dim("T"),)))
    table = g.add_weight(Weight.of("embed", torch.randn(10, 16)))
    b = Builder(g)
    hidden = b.gather(table, ids)
    for module in ("lm_head", "lm_head.again", "other"):
        g.add_output(builder(g, module).linear(hidden, table))
    q = QuantizeWeights(plan("i4")).run(g)
    q.verify()
    stored = {n: v.dtype for n, v in q.weights.items()}
    assert stored.pop("embed") is DType.F32
    assert sorted(d for n, d in stored.items() if "codes" in n) == [DType.I4, DType.I8]
    assert len(q.find("quant.dequantize")) == 2
    assert torch.equal(run(q, [torch.arange(3)])[0], run(q, [torch.arange(3)])[1])


def test_running_twice_changes_nothing():
    for quantization in (INT8, INT4):
        q = QuantizeWeights(quantization).run(moe_graph())
        assert QuantizeWeights(quantization).run(q) == q


@pytest.mark.parametrize("quantize", [INT8, INT4])
def test_a_quantised_graph_goes_through_the_pipeline_again(quantize):
    """Nothing is widened on the way, small weights neither."""
    q = QuantizeWeights(quantize).run(moe_graph(d=16, f=16))
    again, _ = default_pipeline().run(q)
    assert {n for n in again.weights if "codes" in n} == {n for n in q.weights if "codes" in n}
    assert not any("folded" in n for n in again.weights)


def test_what_a_checkpoint_stores_in_fp8_is_stored_anew():
    """But for what is kept, which stays in FP8."""
    codes, scale = quantize_blocks(torch.randn(16, 32), (8, 16))
    source = BlockScaledSource(Weight.of("c", codes), Weight.of("s", scale), (8, 16), torch.float32)
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), 32)))
    w = [g.add_weight(Weight(f"{m}.weight", TensorType("f32", (16, 32)), source)) for m in ("a", "b")]
    for m, v in zip("ab", w, strict=True):
        g.add_output(builder(g, m).linear(x, v))
    after, _ = default_pipeline(plan("i8", keep=("b",))).run(g)
    assert {n: v.dtype for n, v in after.weights.items() if "codes" in n} == {
        "a.weight.codes": DType.I8,
        "b.weight.codes": DType.F8E4M3,
    }
    got = run(after, [torch.eye(32)])
    assert torch.equal(got[0].T, rounded(source.load(), "i8"))
    assert torch.equal(got[1].T, source.load())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", ["i8", "i4"])
def test_weights_that_are_not_finite(bad, weights):
    w = torch.randn(8, 16)
    w[3, 4] = bad
    q = QuantizeWeights(plan(weights)).run(linear_graph(w))
    with pytest.raises(CompileError, match=r"weight 'proj.weight' has 1 NaN or infinite .* row 3, column 4"):
        run(q, [torch.randn(2, 16)])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weights": "i5"}, r"weights='i5'\) is not supported"),
        ({"weights": "i4"}, r"weights='i4', activations='f8e4m3fn'\) is not supported"),
        ({"weights": "i8", "activations": "i8"}, "activations='i8'"),
        (
            {"weights": "i8", "activations": None, "block": (1, 24)},
            r"\(1, 24\) .* 24 columns, expected a multiple of 16",
        ),
        ({"weights": "i8", "activations": None, "block": (0, 32)}, "must be two positive numbers"),
        ({"weights": "i8", "activations": None, "in_i8": ("x",)}, "in_i8 goes with weights='i4'"),
        ({"in_i8": ("x",)}, "in_i8 goes with weights='i4'"),
    ],
)
def test_plans_that_are_refused(fields, said):
    with pytest.raises(ArgumentValueError, match=said) as e:
        Quantization(**fields)
    assert e.value.code == "quantize"


def test_unknown_names():
    with pytest.raises(ArgumentValueError, match="unknown quantize='int3'") as e:
        Quantization.of("int3")
    assert "'int8', 'int4'" in str(e.value)
    with pytest.raises(ArgumentValueError, match="unknown quantize"):
        Quantization.of(8)
