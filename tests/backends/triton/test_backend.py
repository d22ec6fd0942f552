"""The Triton backend: fusion, whole graphs against the reference, taps, refusals, figures."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.backends import get_backend
from moec.backends.triton.backend import TORCH_OPS
from moec.backends.triton.fusion import MAX_NODES, MAX_POINTERS, Group, plan
from moec.ir import ArgumentTypeError, Builder, CompileError, Dim, DType, Graph, TensorType, Value, Weight, all_ops, run
from moec.ir.arrays import copied
from moec.ir.ops.block_codes import quantize_blocks

backend = get_backend("triton")


def inputs_of(graph: Graph, **sizes: int) -> list[torch.Tensor]:
    shapes = [[s if isinstance(s, int) else s.evaluate(sizes) for s in v.shape] for v in graph.inputs]
    return [torch.randn(shape).to(v.dtype.torch) for shape, v in zip(shapes, graph.inputs, strict=True)]


def groups(graph: Graph, keep: tuple[Value, ...] = ()) -> list[Group]:
    return [u for u in plan(graph, keep) if isinstance(u, Group)]


def chain(dtype: str = "bf16") -> tuple[Graph, list[Value]]:
    """where(w > 0, w, −z) of z = (x + y) · 0.3, w = silu(z), and the comparison."""
    g = Graph("chain")
    b = Builder(g)
    x = g.add_input("x", TensorType(DType.of(dtype), (Dim("B"), 5)))
    y = g.add_input("y", TensorType(DType.of(dtype), (5,)))
    z = b.mul(b.add(x, y), 0.3)
    w = b.silu(z)
    c = b.gt(w, 0.0)
    g.add_output(b.where(c, w, b.neg(z)))
    g.add_output(c)
    return g, [z, w, c]


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_chain_is_one_kernel_with_two_results(rows: int):
    g, _ = chain()
    executable = backend.compile(g)
    assert executable.stats["kernels"] == {"elementwise": 1}
    assert executable.stats["fused_nodes"] == 6
    assert executable.stats["torch_ops"] == {}
    inputs = inputs_of(g, B=rows)
    for got, want in zip(executable.run(inputs), run(g, inputs), strict=True):
        assert torch.equal(got, want)  # bf16: rounded after every op, as the reference is


def test_tap_inside_a_group():
    g, values = chain("f32")
    executable = backend.compile(g)
    inputs = inputs_of(g, B=3)
    wanted: dict[Value, torch.Tensor] = {}
    run(g, inputs, tap=lambda v, t: wanted.update({v: t}))
    constant = next(n.result for n in g.nodes if n.op == "tensor.constant")
    seen = executable.tap(inputs, [*values, constant, g.inputs[0]])
    assert list(seen) == [*values, constant, g.inputs[0]]
    for v, got in seen.items():
        torch.testing.assert_close(got, wanted[v])
    with pytest.raises(CompileError, match="not a value of the lowered graph"):
        executable.tap(inputs, [chain()[0].inputs[0]])


def test_no_group_closes_a_cycle():
    """exp and mul are connected directly and through a reduction between them: they must stay apart."""
    g = Graph("cycle")
    b = Builder(g)
    x = g.add_input("x", TensorType(DType.F32, (4, 6)))
    e = b.exp(x)
    total = b.expand(b.sum(e, axes=(-1,), keepdim=True), shape=(4, 6))
    g.add_output(b.add(b.mul(e, total), b.neg(x)))
    found = groups(g)
    by_node = {n.op: i for i, group in enumerate(found) for n in group.nodes}
    assert by_node["math.exp"] != by_node["math.mul"]
    assert by_node["math.mul"] == by_node["math.add"] == by_node["math.neg"]
    order = plan(g)
    done = set(g.inputs)
    for unit in order:
        reads = unit.inputs if isinstance(unit, Group) else unit.operands
        assert set(reads) <= done
        done |= set(unit.outputs if isinstance(unit, Group) else unit.results)
    inputs = inputs_of(g)
    torch.testing.assert_close(backend.compile(g).run(inputs)[0], run(g, inputs)[0])


def test_groups_stay_within_limits():
    g = Graph("long")
    b = Builder(g)
    xs = [g.add_input(f"x{i}", TensorType(DType.F32, (3,))) for i in range(40)]
    y = xs[0]
    for i in range(150):
        y = b.add(y, xs[i % 40])
    g.add_output(y)
    found = groups(g)
    assert sum(len(f.nodes) for f in found) == 150
    assert len(found) > 2
    for group in found:
        assert len(group.nodes) <= MAX_NODES
        assert len(group.inputs) + len(group.outputs) <= MAX_POINTERS


def test_a_constant_is_a_literal_and_a_tensor_where_it_must_be():
    g = Graph("constants")
    b = Builder(g)
    one = b.const(1.5)
    twice = b.add(one, one)  # no tensor among the operands but one of these
    g.add_output(b.mul(twice, one))
    g.add_output(one)
    got = backend.compile(g).run([])
    assert [t.item() for t in got] == [4.5, 1.5]


def layer(tokens: int | Dim, d: int = 16, f: int = 8, e: int = 4) -> Graph:
    """x + y → RMSNorm → linear → route → experts → add, with attention in front."""
    g = Graph("layer")
    b = Builder(g)
    generator = torch.Generator().manual_seed(3)

    def weight(name: str, *shape: int) -> Value:
        return g.add_weight(Weight.of(name, torch.randn(shape, generator=generator) / shape[-1] ** 0.5))

    x = g.add_input("x", TensorType(DType.F32, (tokens, d)))
    heads = b.transpose(b.reshape(x, shape=(1, tokens, 2, d // 2)), perm=(0, 2, 1, 3))
    attended = b.sdpa(heads, heads, heads, scale=0.3, causal=True)
    flat = b.reshape(b.transpose(attended, perm=(0, 2, 1, 3)), shape=(tokens, d))
    h, total = b.add_rms(flat, x, weight("norm", d), eps=1e-5)
    logits = b.linear(h, weight("gate", e, d), weight("gate_bias", e))
    weights, chosen = b.route(logits, k=2, scoring="sigmoid", scale=2.5, normalize_eps=1e-20)
    routed = b.experts(h, weights, chosen, weight("gate_up", e, 2 * f, d), weight("down", e, d, f))
    g.add_output(b.add(routed, total))
    g.add_output(b.mean(b.rms(total), axes=(0,)))
    return g


def test_a_layer_agrees_with_the_reference():
    g = layer(Dim("T"))
    g.verify()
    executable = backend.compile(g)
    stats = executable.stats
    assert stats["kernels"]["moe.experts"] == stats["kernels"]["attention.sdpa"] == 1
    assert stats["torch_ops"] == {"tensor.reshape": 2, "tensor.transpose": 2, "math.mean": 1}
    for rows in (1, 6):
        inputs = inputs_of(g, T=rows)
        for got, want in zip(executable.run(inputs), run(g, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_fp8_ops_agree_with_the_reference():
    """Codes are equal; products differ in the order of additions only."""
    g = Graph("fp8")
    b = Builder(g)
    x = g.add_input("x", TensorType(DType.F32, (3, 40)))
    w = g.add_input("w", TensorType(DType.F32, (6, 40)))
    codes, scale = b.quantize(x, block=(1, 32))
    w_codes, w_scale = b.quantize(w, block=(4, 32))  # 4 rows: torch
    g.add_output(b.scaled_linear(codes, scale, w_codes, w_scale, block=(4, 32), group=32))
    g.add_output(codes)
    executable = backend.compile(g)
    assert executable.stats["torch_ops"] == {"quant.quantize": 1}
    assert executable.stats["kernels"] == {"quant.quantize": 1, "quant.scaled_linear": 1}
    inputs = inputs_of(g)
    (got, got_codes), (want, want_codes) = executable.run(inputs), run(g, inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got_codes.view(torch.uint8), want_codes.view(torch.uint8))


def test_functions_are_called():
    inner = Graph("inner")
    b = Builder(inner)
    x = inner.add_input("x", TensorType(DType.F32, (Dim("N"), 3)))
    inner.add_output(b.mul(b.exp(x), 2.0))
    g = Graph("outer")
    g.functions["inner"] = inner
    a = g.add_input("a", TensorType(DType.F32, (4, 3)))
    call = g.create("call.graph", [a], {"callee": "inner", "dims": (("N", 4),)})
    g.add_output(call.results[0])
    inputs = inputs_of(g)
    torch.testing.assert_close(backend.compile(g).run(inputs)[0], run(g, inputs)[0])


def test_every_op_is_decided_once():
    kinds = set(TORCH_OPS) & {o.name for o in all_ops() if o.elementwise}
    assert not kinds
    assert set(TORCH_OPS) <= {o.name for o in all_ops()}


def test_unsupported_dtypes_and_sizes_say_why():
    g = Graph("refused")
    b = Builder(g)
    q = g.add_input("q", TensorType(DType.F64, (1, 2, 3, 4)))
    g.add_output(b.sdpa(q, q, q, scale=1.0))
    with pytest.raises(CompileError, match=r"attention\.sdpa cannot run on triton.*takes f32, bf16, f16, got f64"):
        moec.compile(g, backend="triton")
    wide = g.add_input("wide", TensorType(DType.F32, (1, 1, 2, 2048)))
    assert "head sizes 2048" in (backend.missing(b.sdpa(wide, wide, wide, scale=1.0).producer) or "")
    e5m2 = g.add_input("e", TensorType(DType.F8E5M2, (3,)))
    assert backend.missing(b.cast(e5m2, dtype="f32").producer) == "triton does not take f8e5m2"


@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_integer_weights_are_dequantised(dtype):
    """No kernel takes them: torch widens them in every run, and the report says so."""
    codes, scale = quantize_blocks(torch.randn(4, 16, 20), (1, 16), DType.of(dtype))
    down, down_scale = quantize_blocks(torch.randn(4, 20, 8), (1, 16), DType.of(dtype))
    g = Graph("integers")
    b = Builder(g)
    x = g.add_input("x", TensorType(DType.F32, (Dim("T"), 20)))
    stored = {"c": codes, "scale": scale, "d": down, "dscale": down_scale}
    c, s, d, ds = (g.add_weight(Weight.of(n, t)) for n, t in stored.items())
    w, i = b.route(b.slice(x, axis=1, start=0, end=4), k=2)
    h = b.scaled_experts(x, w, i, c, s, d, ds, block=(1, 16), group=None)
    first = g.add_weight(Weight.of("first", copied(codes[0]))), g.add_weight(Weight.of("fscale", scale[0].clone()))
    g.add_output(b.linear(h, b.dequantize(*first, block=(1, 16))))
    assert backend.missing(h.producer) == f"weights in {dtype}, the kernel takes f8e4m3fn"
    compiled = moec.compile(g, backend="triton")
    x = torch.randn(3, 20)
    torch.testing.assert_close(compiled(x)[0], run(g, [x])[0], rtol=1e-4, atol=1e-4)
    assert compiled.report.to_dict()["programs"]["forward"]["backend"]["torch_ops"]["quant.dequantize"] == 3
    assert backend.missing(b.cast(g.inputs[0], dtype="i4").producer) == "triton takes i4 in quant.dequantize only"


def test_f64_norm_is_decomposed_into_generated_kernels():
    g = Graph("f64")
    b = Builder(g)
    x = g.add_input("x", TensorType(DType.F64, (2, 5)))
    g.add_output(b.rms(x))
    inputs = inputs_of(g)
    compiled = moec.compile(g, backend="triton")
    torch.testing.assert_close(compiled(*inputs)[0], run(g, inputs)[0], rtol=1e-12, atol=0)


def test_wrong_inputs_are_named():
    g, _ = chain("f32")
    with pytest.raises(ArgumentTypeError, match="'y' has dtype f64, expected f32"):
        backend.compile(g).run([torch.zeros(2, 5), torch.zeros(5, dtype=torch.float64)])


def test_a_failure_names_the_node():
    g = Graph("gather")
    b = Builder(g)
    x = g.add_input("x", TensorType(DType.F32, (3, 2)))
    i = g.add_input("i", TensorType(DType.I64, (2,)))
    g.add_output(b.gather(x, i))
    with pytest.raises(CompileError, match=r"tensor\.gather failed on triton"):
        backend.compile(g).run([torch.zeros(3, 2), torch.tensor([0, 7])])
