"""Codes and scales: the formulas, their errors, and elements of less than 8 bits as bytes and packed."""

from __future__ import annotations

import pytest
import torch

from moec.ir import Builder, CompileError, DType, Graph, TensorType, Weight, parse, run
from moec.ir.arrays import as_bytes, converted, copied, packed, packed_type, unpacked
from moec.ir.cases import with_data
from moec.ir.ops.block_codes import (
    CODES,
    block_amax,
    dequantize_blocks,
    from_blocks,
    in_blocks,
    numbers,
    quantize_blocks,
    spread,
)
from moec.ir.weight import digest

from .samples import seeded

INTEGERS = (DType.I8, DType.I4)
SHAPES = [(1, 1), (3, 129), (64, 32), (5, 7), (2, 3, 40), (0, 8), (8, 0), (2, 0, 4)]
BLOCKS = [(1, 32), (1, 128), (4, 3), (128, 128)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_there_and_back(shape, block):
    x = seeded(*shape)
    parts = in_blocks(x, block)
    assert parts.shape == (*block_amax(x, block).shape, block[0] * block[1])
    assert torch.equal(parts.abs().amax(-1) if x.numel() else block_amax(x, block), block_amax(x, block))
    assert torch.equal(from_blocks(parts, shape, block), x)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_types_and_errors(dtype, shape, block):
    x = seeded(*shape)
    codes, scale = quantize_blocks(x, block, dtype)
    assert TensorType.of(codes) == TensorType(dtype, shape)
    assert TensorType.of(scale) == TensorType("f32", tuple(block_amax(x, block).shape))
    assert codes.is_contiguous()
    back = dequantize_blocks(codes, scale, block)
    assert back.shape == shape
    if x.numel():
        amax = spread(block_amax(x, block), shape, block)
        # a step of the coarsest code; i4 may clip the largest, which becomes 7 or 8 of steps that reach 8.5
        most = {DType.F8E4M3: 2**-4, DType.I8: 0.5 / 127, DType.I4: 0.2}[dtype]
        assert bool(((back - x).abs() <= most * amax * 1.0001).all())


@pytest.mark.parametrize("block", BLOCKS)
def test_i8_is_amax_over_127(block):
    x = seeded(37, 130)
    codes, scale = quantize_blocks(x, block, DType.I8)
    assert torch.equal(scale, block_amax(x, block) / 127)
    assert torch.equal(codes.float(), (x / spread(scale, (37, 130), block)).round())
    assert int(codes.abs().max()) == 127


def squared_error(x, codes, scale, block):
    return in_blocks((dequantize_blocks(codes, scale, block) - x).square(), block).sum(-1)


@pytest.mark.parametrize("block", [(1, 16), (1, 32), (4, 8)])
def test_i4_beats_the_plain_forms(block):
    """Block for block, it is no worse than −8 for the largest element; and its scale fits its codes best."""
    x = seeded(64, 96)
    codes, scale = quantize_blocks(x, block, DType.I4)
    assert -8 <= int(numbers(codes).min()) <= -7
    assert int(numbers(codes).max()) == 7
    mine = squared_error(x, codes, scale, block)
    parts = in_blocks(x, block)
    extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
    for plain, low in ((extreme / -8, -8), (extreme.abs() / 7, -7)):
        tried = from_blocks((parts / plain.unsqueeze(-1)).round().clamp(low, 7), (64, 96), block)
        other = squared_error(x, tried, plain, block)
        assert bool((mine <= other * 1.0001).all()) or low == -7
        assert float(mine.sum()) < 0.95 * float(other.sum())
    for factor in (0.99, 1.01):
        assert bool((squared_error(x, codes, scale * factor, block) > mine).all())


def test_i4_of_a_stack_is_that_of_each():
    x = seeded(3, 10, 40)
    codes, scale = quantize_blocks(x, (1, 32), DType.I4)
    for i in range(3):
        one, s = quantize_blocks(x[i], (1, 32), DType.I4)
        assert torch.equal(as_bytes(codes)[i], as_bytes(one))
        assert torch.equal(scale[i], s)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-30, -1e-3, 3e38, -3e38])
def test_extreme_blocks(dtype, value):
    x = torch.zeros(4, 40)
    x[2, 33] = value
    codes, scale = quantize_blocks(x, (1, 32), dtype)
    assert bool(scale.isfinite().all())
    assert bool((scale != 0).all())
    back = dequantize_blocks(codes, scale, (1, 32))
    assert torch.count_nonzero(back) == (abs(value) > 1e-42) or abs(value) == 1e-44
    assert float(back[2, 33]) == pytest.approx(value, rel=1e-5, abs=1e-42)


def dequantised(codes: str, scale: str, **attrs: object) -> Graph:
    graph = Graph()
    b = Builder(graph)
    given = [graph.add_weight(Weight(n, parse_type(t))) for n, t in (("c", codes), ("scale", scale))]
    graph.add_output(b.dequantize(*given, **attrs))
    return graph


def parse_type(text: str) -> TensorType:
    dtype, shape = text.removesuffix("]").split("[")
    return TensorType(DType.of(dtype), tuple(int(s) for s in shape.split(",")))


@pytest.mark.parametrize("dtype", CODES)
def test_text_and_seeded_data(dtype):
    graph = dequantised(f"{dtype}[6,40]", "f32[6,2]", block=(1, 32))
    assert parse(str(graph)) == graph
    (y,) = run(with_data(graph), [])
    assert y.shape == (6, 40)
    if dtype in INTEGERS:
        codes = numbers(with_data(graph).weights["c"].weight.load())
        assert codes.min() < 0 < codes.max()


@pytest.mark.parametrize(
    ("codes", "scale", "said"),
    [
        ("u8[6,40]", "f32[6,2]", "codes are u8, expected one of f8e4m3fn, i8, i4"),
        ("i8[6,40]", "f32[2,6]", r"scale f32\[2, 6\], expected f32\[6, 2\]"),
        ("i4[6,40]", "f32[6,1]", r"scale f32\[6, 1\], expected f32\[6, 2\]"),
        ("i4[40]", "f32[2]", "must have rank 2 at least"),
    ],
)
def test_refused_types(codes, scale, said):
    with pytest.raises(CompileError, match=said):
        dequantised(codes, scale, block=(1, 32))


@pytest.mark.parametrize(
    ("types", "group", "said"),
    [
        (("i8", "i4"), None, "codes are i8 and i4"),
        (("i4", "i4"), 128, r"weights are i4, activations can be quantised \(group=128\) beside f8e4m3fn only"),
    ],
)
def test_refused_experts(types, group, said):
    graph = Graph()
    x = graph.add_input("x", TensorType("f32", (5, 32)))
    w = graph.add_input("w", TensorType("f32", (5, 2)))
    i = graph.add_input("i", TensorType("i64", (5, 2)))
    gate_up, down = TensorType(types[0], (4, 32, 32)), TensorType(types[1], (4, 32, 16))
    scales = TensorType("f32", (4, 32, 1))
    named = {"gu": gate_up, "gus": scales, "dn": down, "dns": scales}
    stored = [graph.add_weight(Weight(n, t)) for n, t in named.items()]
    with pytest.raises(CompileError, match=said):
        Builder(graph).scaled_experts(x, w, i, *stored, block=(1, 32), group=group)


@pytest.mark.parametrize("dtype", [DType.I4, DType.U4, DType.I2, DType.U2])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 4), ()])
def test_packing(dtype, shape):
    signed = dtype in (DType.I4, DType.I2)
    low = -(2 ** (dtype.bits - 1)) if signed else 0
    x = converted(torch.randint(low, low + 2**dtype.bits, shape), dtype)
    held = packed(x)
    assert TensorType.of(held) == packed_type(TensorType.of(x))
    assert held.numel() == -(-as_bytes(x).numel() * dtype.bits // 8)
    assert torch.equal(as_bytes(unpacked(held, TensorType.of(x))), as_bytes(x))
    again = copied(x)
    assert torch.equal(as_bytes(again), as_bytes(x))
    assert digest(again) == digest(x)
    if x.numel() > 1:
        as_bytes(again).view(-1)[1] ^= 1
        assert digest(again) != digest(x)
        assert not torch.equal(packed(again), held)


def test_packed_order():
    """The first of two in the low half, as in ONNX's int4 and safetensors' neighbours."""
    assert packed(converted(torch.tensor([1, -1, 7]), DType.I4)).tolist() == [0xF1, 0x07]


def test_other_types_are_left_alone():
    x = seeded(3, 4)
    assert packed(x) is x
    assert unpacked(x, TensorType.of(x)) is x
    assert packed_type(TensorType.of(x)) == TensorType.of(x)
