"""Promotion to float64: what widens, what keeps its meaning, and that nothing genuine is lost."""

import pytest
import torch

from moec.ir import Builder, ComputedSource, Dim, DType, Graph, TensorType, Weight, all_ops, parse, run
from moec.ir import opdef as opdef_module
from moec.ir.promote import is_wide, promote, promote_with_slack
from moec.ir.sampling import Sampler, cases


def graph_of(body, dtype="f32", shape=("T", 8), weights=()):
    graph = Graph()
    sizes = tuple(Dim(s) if isinstance(s, str) else s for s in shape)
    x = graph.add_input("x", TensorType(dtype, sizes))
    values = [graph.add_weight(Weight.of(f"w{i}", w)) for i, w in enumerate(weights)]
    graph.add_output(body(Builder(graph), x, *values), "y")
    return graph


def evaluate(graph, *inputs):
    promoted = promote(graph)
    promoted.verify()
    return run(promoted, [t.to(v.dtype.torch) for v, t in zip(promoted.inputs, inputs, strict=True)])[0]


def widened(x):
    return x.to(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("opdef", [o for o in all_ops() if o.samples], ids=lambda o: o.name)
def test_every_reference_works_on_float64(opdef, dtype):
    seen = 0
    for n, m, k in [(0, 1, 5), (3, 2, 7)]:
        for operands, attrs in cases(opdef, Sampler(n, m, k)):
            scales = {n for n, _ in opdef.operands if n.endswith("scale")}
            names = [n for n, _ in opdef.operands] if len(operands) <= len(opdef.operands) else [""] * len(operands)
            fitted = [
                t.to(dtype) if t is not None and t.dtype == torch.float32 and name not in scales else t
                for t, name in zip(operands, names, strict=False)
            ]
            stated = {
                a: DType.of(dtype) for a, v in attrs.items() if isinstance(v, str) and a == "dtype" and v == "f32"
            }
            if opdef.name in ("quant.scaled_linear", "quant.dequantize"):
                stated = {"dtype": DType.of(dtype)}
            graph = Graph()
            values = [None if t is None else graph.add_input(f"x{i}", TensorType.of(t)) for i, t in enumerate(fitted)]
            fitted = [t for t in fitted if t is not None]
            node = graph.create(opdef, values, attrs | stated)
            for r in node.results:
                graph.add_output(r)
            text = str(graph)
            promoted = promote(graph)
            promoted.verify()
            assert str(graph) == text
            got = run(promoted, [t.to(v.dtype.torch) for t, v in zip(fitted, promoted.inputs, strict=True)])
            assert [t.dtype for t in got] == [
                torch.float64 if is_wide(r.dtype) else r.dtype.torch for r in node.results
            ]
            seen += 1
    assert seen


def test_arithmetic_no_longer_rounds():
    graph = graph_of(lambda b, x: b.sub(b.add(x, 1e-5), x), "bf16")
    got = evaluate(graph, torch.ones(2, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(got, torch.full((2, 8), 1e-5, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("narrow", ["f16", "bf16", "f8e4m3fn", "f8e5m2"])
def test_a_cast_below_the_inputs_rounds(narrow):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    graph = graph_of(lambda b, v: b.cast(b.cast(v, dtype=narrow), dtype="f32"))
    want = x.to(DType.of(narrow).torch).to(torch.float64)
    assert torch.equal(evaluate(graph, x), want)
    assert not torch.equal(want, widened(x))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_return_to_the_dtype_of_the_model_is_no_rounding(dtype):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(DType.of(dtype).torch)

    def norm(b, v):
        wide = b.cast(v, dtype="f32")
        return b.cast(b.mul(wide, b.rsqrt(b.mean(b.mul(wide, wide), axes=(-1,), keepdim=True))), dtype=dtype)

    graph = graph_of(norm, dtype)
    assert promote(graph).find("cast") == []
    want = widened(x) * torch.rsqrt(widened(x).square().mean(-1, keepdim=True))
    torch.testing.assert_close(evaluate(graph, x), want, rtol=1e-12, atol=1e-12)


def test_bf16_does_not_return_to_f16():
    x = torch.full((1, 8), 1e6, dtype=torch.bfloat16)  # beyond f16
    graph = graph_of(lambda b, v: b.cast(b.cast(v, dtype="f16"), dtype="bf16"), "bf16")
    assert evaluate(graph, x).isinf().all()


def test_a_table_made_in_f32_is_rounded_to_the_model():
    """cos(positions · inv_freq) in f32 never was bf16: its cast rounds, whatever else the model is in."""
    inverse = torch.rand(8, generator=torch.Generator().manual_seed(1))

    def body(b, x, w):
        return b.mul(x, b.cast(b.cos(w), dtype="bf16"))

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    got = evaluate(graph_of(body, "bf16", weights=[inverse]), x)
    want = widened(x) * widened(inverse).cos().to(torch.bfloat16).to(torch.float64)
    assert torch.equal(got, want)


def test_after_a_rounding_the_narrow_dtype_is_the_models():
    """Autocast: f32 → f16 rounds once; back to f16 after an f32 island is a return."""

    def body(b, x):
        half = b.cast(x, dtype="f16")
        return b.cast(b.exp(b.cast(half, dtype="f32")), dtype="f16")

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    graph = graph_of(body)
    assert torch.equal(evaluate(graph, x), widened(x.to(torch.float16)).exp())


def test_integers_round_to_half_width_floats_only():
    graph = graph_of(lambda b, x: b.cast(x, dtype="bf16"), "i64", ("T",))
    assert evaluate(graph, torch.tensor([257, 3])).tolist() == [256, 3]
    graph = graph_of(lambda b, x: b.cast(x, dtype="f32"), "i64", ("T",))
    assert evaluate(graph, torch.tensor([257, 3])).tolist() == [257, 3]


def test_casts_to_integers_and_bools_stay():
    graph = graph_of(lambda b, x: b.cast(b.cast(x, dtype="i32"), dtype="f32"))
    x = torch.tensor([[1.7, -1.7, 0, 9, 2.5, -0.5, 3, 4]])
    assert evaluate(graph, x).tolist() == [[1, -1, 0, 9, 2, 0, 3, 4]]


def test_f64_narrowed_to_f32_rounds_but_f32_through_f64_does_not():
    x = torch.tensor([[1 + 2.0**-40] * 8], dtype=torch.float64)
    assert evaluate(graph_of(lambda b, v: b.cast(v, dtype="f32"), "f64"), x).tolist() == [[1.0] * 8]
    graph = graph_of(lambda b, v: b.cast(b.mul(b.cast(v, dtype="f64"), 1 + 2.0**-40), dtype="f32"))
    assert evaluate(graph, torch.ones(1, 8)).tolist() == x.tolist()


def test_dtype_attributes_and_constants_widen():
    def body(b, x):
        t = x.shape[0]
        filled = b.full(shape=(t, 8), value=0.1, dtype="f32")
        counted = b.reshape(b.arange(end=t, dtype="f32"), shape=(t, 1))
        return b.add(b.add(x, b.mul(filled, counted)), b.const(0.1))

    got = evaluate(graph_of(body), torch.zeros(3, 8))
    want = torch.arange(3, dtype=torch.float64)[:, None] * 0.1 + 0.1
    torch.testing.assert_close(got, want.expand(3, 8), rtol=1e-15, atol=0)


def test_quantised_ops_keep_their_codes_and_f32_scales():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def body(b, v):
        codes, scale = b.quantize(v, block=(1, 4))
        return b.dequantize(codes, b.mul(scale, 3.0), block=(1, 4), dtype="bf16")

    graph = graph_of(body, "bf16")
    (plain,) = run(graph_of(lambda b, v: b.dequantize(*b.quantize(v, block=(1, 4)), block=(1, 4)), "bf16"), [x])
    torch.testing.assert_close(evaluate(graph, x), 3 * widened(plain), rtol=1e-6, atol=0)
    assert {v.dtype for n in promote(graph).nodes for v in n.results} == {"f8e4m3fn", "f32", "f64"}


@pytest.fixture
def own_ops(monkeypatch):
    """Ops declared in a test do not outlive it."""
    monkeypatch.setattr(opdef_module, "_OPS", dict(opdef_module._OPS))
    monkeypatch.setattr(opdef_module, "_BARE", {k: list(v) for k, v in opdef_module._BARE.items()})


def test_an_op_that_takes_its_own_dtype_only_keeps_it(own_ops):
    from moec.ir.errors import require
    from moec.ir.opdef import Operand, op

    @op("custom.half_only_for_promotion")
    class HalfOnly:
        """Doubles halves."""

        x: Operand

        def infer(self):
            require(self.x.dtype == "f16", f"takes f16, got {self.x.dtype}")
            return self.x

        def reference(self):
            return self.x * 2

    graph = graph_of(lambda b, x: b.add(b.op("custom.half_only_for_promotion", [x]), x), "f16")
    x = torch.tensor([[1.5] * 8], dtype=torch.float16)
    assert evaluate(graph, x).tolist() == [[4.5] * 8]


CALLS = """
graph(%x: bf16[A, 4]) -> (%y: bf16[A, 4]) {
  %0: f32[A, 4] = math.cast(%x) {dtype=f32}
  %1: f32[A, 4] = call.graph(%0) {callee="layer", dims=[["T", A]]}
  %2: f32[A, 4] = call.graph(%1) {callee="layer", dims=[["T", A]]}
  %3: bf16[A, 4] = math.cast(%2) {dtype=bf16}
  return %3
}
function @layer(%h: f32[T, 4]) -> (%o: f32[T, 4]) {
  weight @w: f32[4]
  %0: f32[T, 4] = tensor.full() {shape=[T, 4], value=1.0, dtype=f32}
  %1: f32[T, 4] = math.add(%h, %0)
  %2: f32[T, 4] = math.mul(%1, @w)
  %3: bf16[T, 4] = math.cast(%2) {dtype=bf16}
  %4: f32[T, 4] = math.cast(%3) {dtype=f32}
  return %4
}
"""


def test_calls_are_inlined_with_their_dims_weights_and_origins():
    graph = parse(CALLS)
    graph.functions["layer"].bind_weights({"w": torch.tensor([1.0, 2, 3, 0.1])})
    promoted = promote(graph)
    promoted.verify()
    assert not promoted.functions
    assert len(promoted.weights) == 1
    assert promoted.find("cast") == []  # the values come from bf16, so all casts are returns
    x = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.bfloat16)
    w = torch.tensor([1.0, 2, 3, 0.1]).to(torch.float64)
    assert torch.equal(evaluate(graph, x), ((widened(x) + 1) * w + 1) * w)


def computed(compute):
    graph = Graph()
    x = graph.add_input("x", TensorType("f32", (8,)))
    w = graph.add_weight(Weight("w", TensorType("f32", (8,)), ComputedSource(compute)))
    graph.add_output(Builder(graph).mul(x, w))
    return graph


def test_computed_weights_are_computed_in_float64():
    a = Weight.of("a", torch.rand(8, generator=torch.Generator().manual_seed(0)))
    b = Weight.of("b", torch.rand(8, generator=torch.Generator().manual_seed(1)))
    product = ComputedSource(lambda: a.load() * b.load())
    graph = computed(product.load)
    x = torch.ones(8)
    want = widened(a.load()) * widened(b.load())
    assert torch.equal(evaluate(graph, x), want)
    # and the cached, rounded data is what everyone else reads
    assert torch.equal(graph.weights["w"].weight.load(), a.load() * b.load())
    assert torch.equal(run(graph, [x])[0], a.load() * b.load())


def test_weights_computed_with_dtypes_of_their_own_are_taken_as_they_are():
    a = Weight.of("a", torch.rand(3, 8, generator=torch.Generator().manual_seed(0)))
    fixed = torch.rand(1, 3)
    graph = computed(lambda: torch.mm(fixed, a.load())[0])  # float64 against float32: torch refuses
    want = torch.mm(fixed, a.load())[0]
    assert torch.equal(evaluate(graph, torch.ones(8)), widened(want))
    both = promote_with_slack(graph)
    moved = run(both.rounded, [torch.ones(8, dtype=torch.float64)])[0]
    assert 0 < (moved - widened(want)).abs().max() < 1e-6


def test_slack_is_the_rounding_of_weight_only_arithmetic():
    w = torch.rand(8, generator=torch.Generator().manual_seed(0))
    graph = graph_of(lambda b, x, v: b.mul(x, b.exp(v)), weights=[w])
    both = promote_with_slack(graph)
    x = torch.ones(1, 8, dtype=torch.float64)
    assert torch.equal(run(both.graph, [x])[0][0], widened(w).exp())
    assert torch.equal(run(both.rounded, [x])[0][0], widened(w.exp()))


@pytest.mark.parametrize("value", [0.5, 2.0, -3.0, 0.125, 2.0**-20, 1024.0, 0.0])
def test_short_binary_fractions_leave_nothing_open(value):
    assert promote_with_slack(graph_of(lambda b, x: b.mul(x, value))).rounded is None


def test_other_constants_stand_for_what_rounds_to_them():
    both = promote_with_slack(graph_of(lambda b, x: b.mul(x, 0.7978845)))
    (moved,) = run(both.rounded, [torch.ones(1, 8, dtype=torch.float64)])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.7978845 * (1 + 2.0**-24)), rtol=1e-14, atol=0)


def test_a_graph_without_data_is_promoted_too():
    graph = parse(
        "graph(%x: f32[T]) -> (%y: f32[T]) {\n weight @w: f32[1]\n %0: f32[T] = math.mul(%x, @w)\n return %0\n}"
    )
    promoted = promote(graph)
    promoted.verify()
    assert promoted.weights["w"].type == TensorType("f64", (1,))
