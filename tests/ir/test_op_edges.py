"""What ops take and refuse at the edges of dtypes, numbers and indices, and what they leave open."""

import math

import pytest
import torch

from moec.ir import CompileError, DType, Graph, TensorType, lookup, parse, run
from moec.ir.cases import make_inputs, with_data
from moec.ir.equivalence import Oracle
from moec.ir.literals import check_literal, literal


def node(op, operands, attrs=None):
    graph = Graph()
    values = [graph.add_input(f"x{i}", TensorType.of(t)) for i, t in enumerate(operands)]
    for r in graph.create(op, values, attrs or {}).results:
        graph.add_output(r)
    return graph


CODES = torch.tensor([[1.0, 2.0, -3.0]]).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("op", "count", "attrs"),
    [
        ("math.add", 2, {}),
        ("math.neg", 1, {}),
        ("math.lt", 2, {}),
        ("math.gelu", 1, {}),
        ("math.clamp", 1, {"low": 0.0}),
        ("math.sum", 1, {"axes": (0,)}),
        ("math.argmax", 1, {}),
        ("math.sort", 1, {}),
        ("math.topk", 1, {"k": 1}),
        ("math.softmax", 1, {}),
        ("math.cumsum", 1, {}),
        ("norm.rms", 1, {}),
        ("tensor.nonzero", 1, {"count": 3}),
    ],
)
def test_codes_are_no_numbers(op, count, attrs):
    with pytest.raises(CompileError, match="f8e4m3fn"):
        node(op, [CODES] * count, attrs)


def test_codes_can_be_moved():
    index = torch.tensor([[2, 0]])
    (got,) = run(node("tensor.gather_elements", [CODES, index], {"axis": 1}), [CODES, index])
    assert got.dtype == torch.float8_e4m3fn
    assert got.float().tolist() == [[-3.0, 1.0]]
    source = torch.tensor([[5.0, 6.0]]).to(torch.float8_e4m3fn)
    graph = node("tensor.scatter_elements", [CODES, index, source], {"axis": 1})
    assert run(graph, [CODES, index, source])[0].float().tolist() == [[6.0, 2.0, 5.0]]
    with pytest.raises(CompileError, match="numbers, got f8e4m3fn"):
        node("tensor.scatter_elements", [CODES, index, source], {"axis": 1, "reduce": "add"})


@pytest.mark.parametrize(("op", "attrs"), [("math.argmax", {}), ("math.cumsum", {})])
def test_bools_are_no_numbers(op, attrs):
    with pytest.raises(CompileError, match="bool"):
        node(op, [torch.ones(3, dtype=torch.bool)], attrs)


def test_complex_numbers_have_no_order():
    with pytest.raises(CompileError, match="order, got c64"):
        node("math.sort", [torch.ones(3, dtype=torch.complex64)])


@pytest.mark.parametrize(
    ("value", "dtype", "want"),
    [(1e30, "f16", math.inf), (-1e30, "f16", -math.inf), (1e300, "f32", math.inf), (0.1, "bf16", 0.10009765625),
     (500.0, "f8e4m3fn", 448.0), (3.0, "i8", 3), (1, "bool", True)],
)  # fmt: skip
def test_numbers_round_to_the_dtype_as_casts_do(value, dtype, want):
    check_literal(value, DType(dtype))
    assert literal(value, DType(dtype)) == want


@pytest.mark.parametrize(
    ("value", "dtype"), [(300, "u8"), (-1, "u8"), (128, "i8"), (2**63, "i64"), (math.nan, "i64"), (2.5, "i32")]
)
def test_integers_are_whole_and_in_range(value, dtype):
    with pytest.raises(CompileError, match=rf"{dtype} does not hold"):
        check_literal(value, DType(dtype))


def test_filling_with_more_than_half_floats_hold():
    x = torch.ones(1, dtype=torch.float16)
    pad = node("tensor.pad", [x], {"before": (1,), "after": (0,), "value": 1e30})
    assert run(pad, [x])[0].tolist() == [math.inf, 1.0]
    assert run(node("tensor.full", [], {"shape": (1,), "value": -1e30, "dtype": "f16"}), [])[0].item() == -math.inf
    assert run(node("math.clamp", [x], {"high": 1e30}), [x])[0].item() == 1.0


@pytest.mark.parametrize(
    ("op", "attrs"),
    [("math.clamp", {"high": 0.5}), ("tensor.pad", {"before": (1,), "after": (0,), "value": 300})],
)
def test_integers_are_filled_and_clamped_with_their_own(op, attrs):
    with pytest.raises(CompileError, match="u8 does not hold"):
        node(op, [torch.ones(3, dtype=torch.uint8)], attrs)


@pytest.mark.parametrize("op", ["norm.rms", "norm.layer"])
@pytest.mark.parametrize("eps", [-1e-5, math.nan])
def test_eps_is_not_negative(op, eps):
    with pytest.raises(CompileError, match="eps is"):
        node(op, [torch.ones(2, 4)], {"eps": eps})


@pytest.mark.parametrize("ends", [[2, 1, 3], [1, 2, 4], [-1, 2, 3]])
def test_offsets_of_groups_ascend_to_the_number_of_rows(ends):
    tensors = torch.ones(3, 2), torch.ones(3, 2, 2), torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(CompileError, match="do not ascend to at most 3"):
        run(node("linear.grouped_matmul", tensors), tensors)


def test_codes_scaled_to_codes_are_refused():
    scale = torch.ones(1, 1)
    with pytest.raises(CompileError, match="dtype f8e4m3fn"):
        node("quant.dequantize", [CODES, scale], {"block": (1, 4), "dtype": "f8e4m3fn"})


def undefined(op, operands, attrs):
    opdef = lookup(op)
    return opdef.undefined(operands, opdef.complete_attrs(attrs))


@pytest.mark.parametrize(
    ("x", "dtype", "want"),
    [(math.nan, "i64", True), (1e30, "i64", True), (-(2.0**63), "i64", False), (2.0**63, "i64", True),
     (127.9, "i8", False), (128.0, "i8", True), (-0.5, "u8", False), (-1.0, "u8", True), (math.inf, "f16", False)],
)  # fmt: skip
def test_what_a_cast_to_integers_leaves_open(x, dtype, want):
    assert undefined("math.cast", [torch.tensor([0.0, x], dtype=torch.float64)], {"dtype": dtype}) is want


def test_two_writes_to_one_place_are_open():
    x, source = torch.zeros(2, 3), torch.ones(2, 2)
    once, twice = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 1], [2, 2]])
    assert not undefined("tensor.scatter_elements", [x, once, source], {"axis": 1})
    assert undefined("tensor.scatter_elements", [x, twice, source], {"axis": 1})
    assert not undefined("tensor.scatter_elements", [x, twice, source], {"axis": 1, "reduce": "add"})
    rows = torch.tensor([1, -1])
    assert undefined("tensor.index_put", [x, rows, torch.ones(2, 3)], {})
    assert not undefined("tensor.index_put", [x, rows, torch.ones(2, 3)], {"accumulate": True})
    assert not undefined("math.add", [x, x], {})


def test_a_negative_zero_is_no_default():
    text = (
        "graph(%x: f32[T, 4]) -> (%w: f32[T, 2], %e: i64[T, 2]) {\n"
        "  %0: f32[T, 2], %1: i64[T, 2] = moe.route(%x, _) {k=2, normalize_eps=-0.0}\n  return %0, %1\n}\n"
    )
    assert str(parse(text)) == text


def test_seeded_offsets_ascend_whatever_else_they_are():
    text = (
        "graph(%x: f32[T, 2], %w: f32[4, 2, 2], %offsets: i32[4]) -> (%y: f32[T, 2], %m: bool[4]) {\n"
        "  weight @ends: i32[4]\n  weight @rows: f32[5, 2]\n"
        "  %0: f32[T, 2] = linear.grouped_matmul(%x, %w, %offsets)\n"
        "  %1: f32[5, 2] = linear.grouped_matmul(@rows, %w, @ends)\n"
        "  %2: bool[4] = math.cast(%offsets) {dtype=bool}\n  return %0, %2\n}"
    )
    graph = with_data(parse(text))
    assert graph.weights["ends"].weight.load()[-1] == 5
    inputs = make_inputs(graph, {"T": 7})
    assert inputs[2][-1] == 7
    run(graph, inputs)


def test_logits_that_are_all_equal_are_not_looked_for():
    """Anything else that is zero looks like them: it must not be pinned in their place."""
    router = "  %0: f32[2, 3] = linear.linear(%z, @r, _)\n  %1: f32[2, 2], %2: i64[2, 2] = math.topk(%0) {k=2}\n"
    head = "graph(%x: i64[2]) -> (%y: f32[2, 3]) {\n  weight @r: f32[3, 4]\n  weight @g: f32[3, 4]\n"
    zeros = "  %z: f32[2, 4] = tensor.full() {shape=[2, 4], value=0.0, dtype=f32}\n"
    gate = "  %4: f32[2, 3] = linear.linear(%z, @g, _)\n  return %4\n}"
    assert Oracle(parse(head + zeros + router + gate)).difference(parse(head + zeros + gate)) is None


def test_softplus_keeps_its_digits_in_f64():
    x = torch.tensor([20.5, 35.0], dtype=torch.float64)
    (got,) = run(node("math.softplus", [x]), [x])
    assert torch.equal(got, x + torch.log1p(torch.exp(-x)))


def test_limits_beyond_f16_do_not_limit():
    x = torch.randn(3, 4).half()
    glu = [run(node("math.glu", [x, x], {"limit": limit}), [x, x])[0] for limit in (1e30, 1e4)]
    assert torch.equal(*glu)
    tensors = (
        x,
        torch.rand(3, 1).half(),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.randn(2, 6, 4),
        torch.randn(2, 4, 3),
    )
    tensors = [t.half() if t.is_floating_point() else t for t in tensors]
    experts = [run(node("moe.experts", tensors, {"limit": limit}), tensors)[0] for limit in (1e30, 1e4)]
    assert torch.equal(*experts)


def test_indices_to_write_at_are_not_longer_than_what_is_written_to():
    x, index = torch.zeros(5, 1), torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(CompileError, match="longer than x on axis 1: 2 > 1"):
        node("tensor.scatter_elements", [x, index, torch.zeros(5, 2)], {"axis": 0, "reduce": "add"})


@pytest.mark.parametrize(
    ("dtype", "size", "want"),
    [("f32", 1e18, False), ("f32", 1e19, True), ("f32", math.inf, False), ("bf16", 1e20, True), ("f16", 6e4, False),
     ("f64", 1e150, False), ("f64", 1e160, True)],
)  # fmt: skip
def test_sums_near_the_end_of_the_range_are_open(dtype, size, want):
    x = torch.tensor([[1.0, size]], dtype=torch.float64).to(DType(dtype).torch)
    assert undefined("norm.rms", [x, None], {}) is want
    assert undefined("linear.matmul", [x, x.T], {}) is want
    assert undefined("math.sum", [x], {"axes": (0,)}) is want
    assert not undefined("math.add", [x, x], {})


def test_what_overflows_f16_and_what_attends_to_nothing_is_open():
    assert undefined("math.cast", [torch.tensor([1.0, 7e4])], {"dtype": "f16"})
    assert not undefined("math.cast", [torch.tensor([1.0, 6e4, math.inf])], {"dtype": "f16"})
    dead = torch.tensor([[1.0, -math.inf], [-math.inf, -math.inf]])
    assert undefined("math.softmax", [dead], {})
    assert not undefined("math.softmax", [dead[:1]], {})
    assert not undefined("math.softmax", [torch.zeros(0, 3)], {})


def test_attention_to_scores_of_minus_infinity_only_is_undefined_and_a_masked_row_is_not():
    q, k = torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[-torch.inf, 1.0], [0.5, 0.5]]]])
    attrs = {"scale": 1.0}
    assert not undefined("attention.sdpa", [q, k, k, None, None], attrs)
    assert undefined("attention.sdpa", [q, k[:, :, :1], k[:, :, :1], None, None], attrs)
    for mask in (torch.tensor([[[[True, False]]]]), torch.tensor([[[[0.0, -torch.inf]]]])):
        assert undefined("attention.sdpa", [q, k, k, mask, None], attrs)
    closed = torch.tensor([[[[False, False]]]])
    assert undefined("attention.sdpa", [q, k, k, closed, None], attrs)  # it hides a score that is not finite
    assert not undefined("attention.sdpa", [q, k.clamp(-1), k, closed, None], attrs)
    assert not undefined("attention.sdpa", [q, k, k, torch.full((1, 1, 1, 2), -torch.inf), None], attrs)
    assert not undefined("attention.sdpa", [q, k[:, :, :1], k[:, :, :1], None, torch.zeros(1)], attrs)


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_clamped_unit_has_a_limit_of_at_least_0(limit):
    x = torch.ones(2, 2)
    with pytest.raises(CompileError, match="is no number of at least 0"):
        node("math.glu", [x, x], {"limit": limit})
