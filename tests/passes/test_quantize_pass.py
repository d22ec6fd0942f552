"""QuantizeWeights: which weights, with which codes and scales, and what it reports or refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.ir import Builder, CompileError, ComputedSource, Dim, DType, Graph, Quantization, TensorType, Weight, run
from moec.ir.ops.block_codes import dequantize_blocks, quantize_blocks
from moec.passes.coverage import quantized_coverage
from moec.passes.pipeline import run_pass
from moec.passes.quantize import QuantizeWeights

from .placement_cases import builder, moe_graph

SMALL = Quantization(block=(8, 8), group=8)
WEIGHT_ONLY = Quantization(activations=None)


def linear_graph(weight: torch.Tensor, bias: bool = False, rank: int = 2, module: str = "proj") -> Graph:
    g = Graph()
    dtype = DType.of(weight.dtype)
    shape = (*[Dim("T"), 3, 2][: rank - 1], weight.shape[1])
    x = g.add_input("x", TensorType(dtype, shape))
    w = g.add_weight(Weight.of(f"{module}.weight", weight))
    b = g.add_weight(Weight.of(f"{module}.bias", torch.ones(weight.shape[0], dtype=weight.dtype))) if bias else None
    g.add_output(builder(g, module).linear(x, w, b))
    return g


def rounded(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return dequantize_blocks(*quantize_blocks(x, block), block)


@pytest.mark.parametrize("shape", [(128, 128), (576, 200), (1, 1), (3, 129), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_deepseeks(shape, dtype):
    w = torch.randn(shape).to(dtype)
    q = QuantizeWeights(Quantization(min_coverage=0)).run(linear_graph(w))
    codes, scale = (q.weights[f"proj.weight.{what}"].weight.load() for what in ("codes", "scale"))
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float()
            assert scale[i, j] == block.abs().amax() / 448
            at = codes[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float() * scale[i, j]
            # half a step of a 3-bit mantissa, or half the subnormal step 2⁻⁹
            assert ((at - block).abs() <= torch.maximum(block.abs() * 2**-4, scale[i, j] * 2**-10) * 1.0001).all()
    assert "proj.weight" not in q.weights


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_linear_computes_on_rounded_operands(rank, dtype, tokens):
    w = torch.randn(130, 200).to(dtype)
    g = linear_graph(w, bias=True, rank=rank)
    before = str(g)
    q = QuantizeWeights().run(g)
    q.verify()
    assert str(g) == before
    x = torch.randn(*[tokens, 3, 2][: rank - 1], 200).to(dtype)
    expected = F.linear(rounded(x, (1, 128)), rounded(w, (128, 128))).to(dtype) + torch.ones(130, dtype=dtype)
    got = run(q, [x])[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
    node = q.find("quant.scaled_linear")[0]
    assert node.attrs == {"block": (128, 128), "group": 128, "dtype": DType.of(dtype)}
    if tokens:
        assert not torch.allclose(got.float(), F.linear(x, w, torch.ones(130, dtype=dtype)).float(), rtol=1e-3)


EXPERTS = [
    {},
    {"activation": "gelu"},
    {"activation": "gelu_tanh", "interleaved": True},
    {"biases": True},
    {"biases": True, "limit": 0.7, "interleaved": True},
]


@pytest.mark.parametrize("options", EXPERTS)
@pytest.mark.parametrize("quantization", [SMALL, WEIGHT_ONLY])
def test_experts_compute_on_rounded_operands(options, quantization):
    g = moe_graph(layers=1, d=24, f=12, **options)
    q = QuantizeWeights(quantization).run(g)
    q.verify()
    seen = {}
    node, new = g.find("moe.experts")[0], q.find("quant.scaled_experts")[0]
    x = torch.randn(20, 24)
    run(q, [x], tap=lambda v, t: seen.update({v: t}))
    h, weights, experts = (seen[v] for v in new.operands[:3])
    gate_up, down = (node.operand(n).weight.load() for n in ("gate_up", "down"))
    if options.get("interleaved"):
        gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
    biases = [node.operand(n).weight.load() if options.get("biases") else None for n in ("gate_up_bias", "down_bias")]
    if options.get("interleaved") and options.get("biases"):
        biases[0] = torch.cat([biases[0][:, 0::2], biases[0][:, 1::2]], dim=1)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[
        options.get("activation", "silu")
    ]
    group = (1, quantization.group)
    inner = (lambda t: t) if quantization.activations is None else (lambda t: rounded(t, group))
    expected = torch.zeros_like(h)
    for t in range(20):
        for j, e in enumerate(experts[t].tolist()):
            added = [None if b is None else b[e] for b in biases]
            gate, up = F.linear(inner(h[t : t + 1]), rounded(gate_up[e], quantization.block), added[0]).chunk(2, -1)
            if "limit" in options:
                gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
                hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                hidden = act(gate) * up
            y = F.linear(inner(hidden), rounded(down[e], quantization.block), added[1])
            expected[t] += weights[t, j] * y[0]
    torch.testing.assert_close(seen[new.result], expected, rtol=1e-4, atol=1e-4)


def test_one_quantisation_per_value():
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), 16)))
    w = [g.add_weight(Weight.of(f"w{i}", torch.randn(16, 16))) for i in range(2)]
    b = Builder(g)
    y = [b.linear(x, w[0]), b.linear(x, w[1]), b.linear(b.silu(x), w[0])]
    for v in y:
        g.add_output(v)
    q = QuantizeWeights(SMALL).run(g)
    q.verify()
    assert len(q.find("quant.quantize")) == 2
    assert sorted(q.weights) == ["w0.codes", "w0.scale", "w1.codes", "w1.scale"]
    only = QuantizeWeights(WEIGHT_ONLY).run(g)
    only.verify()
    assert len(only.find("quant.dequantize")) == 2
    assert not only.find("quant.quantize")


def test_a_weight_read_in_two_row_orders_is_stored_twice():
    g = moe_graph()
    first, second = g.find("moe.experts")
    g.replace_operand(second, 3, first.operands[3])
    second.attrs["interleaved"] = True
    q = QuantizeWeights().run(g)
    q.verify()
    codes = [n.operand("gate_up").weight.load().float() for n in q.find("quant.scaled_experts")]
    assert torch.equal(codes[1], torch.cat([codes[0][:, 0::2], codes[0][:, 1::2]], dim=1))


def test_weight_only_rounds_nothing_but_weights():
    w, x = torch.randn(40, 130), torch.randn(6, 130)
    q = QuantizeWeights(WEIGHT_ONLY).run(linear_graph(w))
    q.verify()
    assert torch.equal(run(q, [x])[0], F.linear(x, rounded(w, (128, 128))))
    assert quantized_coverage(q).share == 1.0


def test_routers_and_kept_modules_stay():
    g = moe_graph()
    q = QuantizeWeights(SMALL).run(g)
    left = {x.weight: x.reason for x in quantized_coverage(q).left}
    assert left == {
        "layers.0.gate.weight": "router projection",
        "layers.1.gate.weight": "router projection",
        "lm_head.weight": "kept by request",
    }
    # the routing sees unrounded weights
    assert len(q.find("linear.linear")) == 3
    everything = QuantizeWeights(Quantization(keep=())).run(g)
    assert len(everything.find("linear.linear")) == 2
    nothing = QuantizeWeights(Quantization(keep=("layers", "lm_head"), min_coverage=0)).run(g)
    assert nothing == g
    one = QuantizeWeights(Quantization(keep=("layers.1",))).run(g)
    assert {n.location.module for n in one.find("quant.scaled_linear")} == {"layers.0.proj", "lm_head"}
    # a prefix ends at a dot
    assert QuantizeWeights(Quantization(keep=("layers.1.pro", "lm"))).run(g) == everything


def test_a_router_behind_casts_and_reshapes_is_found():
    g = Graph()
    x = g.add_input("x", TensorType("bf16", (Dim("B"), 4, 16)))
    b = Builder(g)
    hidden = b.linear(x, g.add_weight(Weight.of("proj", torch.randn(16, 16).bfloat16())))
    logits = b.linear(hidden, g.add_weight(Weight.of("router", torch.randn(8, 16).bfloat16())))
    flat = b.mul(b.cast(b.reshape(logits, shape=(Dim("B") * 4, 8)), dtype="f32"), 0.5)
    for v in b.route(flat, k=2):
        g.add_output(v)
    q = QuantizeWeights(Quantization(min_coverage=0)).run(g)
    q.verify()
    assert [n.operand("weight").weight.name for n in q.find("linear.linear")] == ["router"]
    assert [n.operand("weight").weight.name for n in q.find("quant.scaled_linear")] == ["proj.codes"]


def test_too_little_that_can_be_quantised():
    g = moe_graph(layers=1)
    (node,) = g.find("moe.experts")
    b = Builder(g, before=node)
    g.replace_operand(node, 3, b.mul(node.operand("gate_up"), node.operand("gate_up")))
    q = QuantizeWeights(Quantization(min_coverage=0)).run(g)
    q.verify()
    assert q.find("moe.experts")
    left = [x.reason for x in quantized_coverage(q).left]
    assert sum("not a stored weight" in r for r in left) == 1
    with pytest.raises(CompileError, match=r"min_coverage asks for 50\.0%") as e:
        QuantizeWeights().run(g)
    assert e.value.code == "coverage"
    assert "layers.0.down" in str(e.value)


def test_coverage_counts_bytes():
    g = moe_graph(layers=1, experts=6, d=16, f=8, dtype="bf16")
    q, record = run_pass(QuantizeWeights(), g)
    weights = 2 * (16 * 16 + 6 * 16 * 16 + 6 * 16 * 8)
    kept = 2 * (6 * 16 + 32 * 16)
    coverage = quantized_coverage(q)
    assert (coverage.quantised_bytes, coverage.candidate_bytes) == (weights, weights + kept)
    assert record.figures["share"] == coverage.share == weights / (weights + kept)
    assert quantized_coverage(g).quantised_bytes == 0
    assert quantized_coverage(Graph()).share == 1.0
    assert "lm_head.weight (1,024 bytes): kept by request" in str(coverage)


def test_a_matmul_with_a_weight_counts_as_left():
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), 8)))
    w = g.add_weight(Weight.of("w", torch.randn(8, 4)))
    g.add_output(Builder(g).matmul(x, w))
    assert quantized_coverage(g).share == 0.0
    with pytest.raises(CompileError, match=r"matmul with a weight"):
        QuantizeWeights().run(g)


def test_products_of_activations_are_no_candidates():
    g = Graph()
    x = g.add_input("x", TensorType("f32", (Dim("T"), 8)))
    b = Builder(g)
    g.add_output(b.matmul(x, b.transpose(x, perm=(1, 0))))
    assert QuantizeWeights().run(g) == g


def test_a_vector_input_is_left():
    q = QuantizeWeights(Quantization(min_coverage=0)).run(linear_graph(torch.randn(4, 8), rank=1))
    q.verify()
    assert "no token axis" in quantized_coverage(q).left[0].reason


def test_a_tied_embedding_keeps_its_table():
    g = Graph()
    ids = g.add_input("ids", TensorType("i64", (Dim("T"),)))
    table = g.add_weight(Weight.of("embed", torch.randn(10, 8)))
    b = Builder(g)
    g.add_output(b.linear(b.gather(table, ids), table))
    q = QuantizeWeights(SMALL).run(g)
    q.verify()
    assert sorted(q.weights) == ["embed", "embed.codes", "embed.scale"]


def test_nothing_is_read_before_it_is_needed_and_codes_are_computed_once():
    reads = []
    data = torch.randn(8, 8)
    g = linear_graph(data)
    value = g.weights["proj.weight"]
    value.weight = Weight("proj.weight", value.type, ComputedSource(lambda: reads.append(1) or data))
    q = QuantizeWeights().run(g)
    assert not reads
    for name in ("proj.weight.codes", "proj.weight.scale"):
        q.weights[name].weight.load()
    assert reads == [1]


def test_weights_without_data_are_quantised_in_type():
    g = linear_graph(torch.randn(8, 8))
    g.weights["proj.weight"].weight = Weight("proj.weight", TensorType("f32", (8, 8)))
    q = QuantizeWeights().run(g)
    q.verify()
    assert q.weights["proj.weight.codes"].weight.source is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(bad):
    w = torch.randn(8, 8)
    w[3, 4] = bad
    q = QuantizeWeights().run(linear_graph(w))
    with pytest.raises(CompileError, match=r"weight 'proj.weight' has 1 NaN or infinite"):
        run(q, [torch.randn(2, 8)])


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-40, 1e-30, 3e38, 448.0])
def test_extreme_blocks(value):
    w = torch.zeros(8, 8)
    w[2, 3] = value
    q = QuantizeWeights().run(linear_graph(w))
    codes, scale = (q.weights[f"proj.weight.{what}"].weight.load() for what in ("codes", "scale"))
    assert scale.isfinite().all()
    assert (scale > 0).all()
    back = dequantize_blocks(codes, scale, (128, 128))
    assert back.isfinite().all()
    assert torch.count_nonzero(back) == (value > 1e-42)
    assert back[2, 3] == pytest.approx(value, rel=1e-2, abs=1e-42)


def test_functions_are_rewritten_too():
    inner, outer = linear_graph(torch.randn(16, 16)), Graph()
    inner.name = "layer"
    outer.functions["layer"] = inner
    x = outer.add_input("x", inner.inputs[0].type)
    node = outer.create("call.graph", [x], {"callee": "layer", "dims": (("T", x.shape[0]),)})
    outer.add_output(node.result)
    q = QuantizeWeights().run(outer)
    q.verify()
    assert len(q.find("quant.scaled_linear")) == 1
    assert not outer.find("quant.scaled_linear")
    assert quantized_coverage(q).share == 1.0


def test_running_twice_changes_nothing():
    q = QuantizeWeights().run(moe_graph())
    assert QuantizeWeights().run(q) == q
