"""Products with stored integer weights: com.microsoft.MatMulNBits and QMoE.

Both take codes of 4 or 8 bits, made unsigned by adding 2^(bits − 1), packed along K in blocks of 16 … 256 with an f32
scale each. At accuracy level 4 the rows of activations are rounded to i8 per block on the way in (scale amax / 127);
for 8 bits there is no other fast kernel, for 4 bits it is the faster one (bench/RESULTS.md). NaN becomes a number then.
It stays in the residual stream all the same, and the last product of a graph puts it back (`carrying`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as onnx
import torch
import torch.nn.functional as F

from moec.backends.onnxruntime.emit import MICROSOFT, Emitter
from moec.ir import DType, Node, Value

BLOCKS = (16, 32, 64, 128, 256)
LEVEL = 4
_ONE_BLOCK = 128  # for longer rows that have one scale each
INTEGERS = (DType.I8, DType.I4)
_PASSING = ("math.cast", "tensor.reshape", "tensor.slice", "tensor.transpose")


def block_size(k: int, columns: int) -> int | None:
    """The largest block of the operators that stored blocks of `columns` along K consist of; None where there is
    none."""
    if columns >= k:
        return next((b for b in BLOCKS if b >= k), _ONE_BLOCK)
    return max((b for b in BLOCKS if columns % b == 0), default=None)


def is_stored(codes: Value, scale: Value) -> bool:
    """Whether these are stored integer codes and scales, of a matrix that is not empty."""
    return codes.weight is not None and scale.weight is not None and codes.dtype in INTEGERS and all(codes.shape)


def is_integer(weight: Value) -> bool:
    """Whether a weight is dequantised from integers."""
    made = weight.producer
    return made is not None and made.op == "quant.dequantize" and made.operand("codes").dtype in INTEGERS


def stored_weight(node: Node) -> Node | None:
    """The dequantize that gives the weight of a linear layer, where a product can take what is stored; else None."""
    x, weight = node.operand("x"), node.operand("weight")
    made = weight.producer
    if made is None or not is_integer(weight) or x.dtype is DType.F64 or x.type.rank < 2:
        return None
    codes = made.operand("codes")
    return made if is_stored(codes, made.operand("scale")) and takes(codes, made.attrs["block"]) else None


def takes(codes: Value, block: tuple[int, int]) -> bool:
    """Whether the operators' blocks can make up these."""
    return block_size(int(codes.shape[-1]), block[1]) is not None


def stored_experts(node: Node) -> bool:
    """Whether the products of `quant.scaled_experts` can take what is stored."""
    block = node.attrs["block"]
    codes = node.operand("gate_up"), node.operand("down")
    scales = node.operand("gate_up_scale"), node.operand("down_scale")
    return all(is_stored(c, s) and takes(c, block) for c, s in zip(codes, scales, strict=True))


def rounded_products(node: Node) -> int:
    """How many products, one after the other, round the rows that go into them."""
    match node.op:
        case "linear.linear":
            return int(stored_weight(node) is not None)
        case "quant.scaled_experts":
            return 2 * stored_experts(node)
    return 0


def product(
    e: Emitter,
    x: onnx.Value,
    codes: Value,
    scale: Value,
    block: tuple[int, int],
    *,
    bias: onnx.Value | None = None,
    index: int | None = None,
    rows: torch.Tensor | None = None,
    key: str = "",
) -> onnx.Value:
    """f32 x [..., K] times the transpose of stored codes [N, K] · scale, or of matrix `index` of [E, N, K], its rows
    taken in the order `rows`; `key` tells these orders apart."""
    n, k = (int(s) for s in codes.shape[-2:])
    size = block_size(k, block[1])
    assert size is not None
    packed, scales = operands(e, codes, scale, block, size, index=index, rows=rows, key=key)
    extra = () if bias is None else (None, None, bias)
    return e.op(
        "MatMulNBits",
        *(x, packed, scales, *extra),
        domain=MICROSOFT,
        K=k,
        N=n,
        bits=codes.dtype.bits,
        block_size=size,
        accuracy_level=LEVEL,
    )


def carrying(e: Emitter, y: onnx.Value, x: onnx.Value, width: int) -> onnx.Value:
    """f32 y [..., N] with NaN in the rows in which x [..., width] has NaN or infinity."""
    return e.op("Add", y, e.op("MatMul", x, np.zeros((width, 1), np.float32)))


def leaves(value: Value) -> bool:
    """Whether a value is a result of the graph, as it is or in another shape or dtype."""
    return value.is_output or any(leaves(r) for u in value.users if u.op in _PASSING for r in u.results)


def operands(
    e: Emitter,
    codes: Value,
    scale: Value,
    block: tuple[int, int],
    size: int,
    *,
    index: int | None = None,
    rows: torch.Tensor | None = None,
    key: str = "",
    flat: bool = False,
) -> tuple[onnx.Value, onnx.Value]:
    """Packed codes u8[..., N, blocks, size · bits / 8] (`flat`: the last two axes in one) and scales
    f32[..., N, blocks] as initialisers."""
    *lead, n, k = (int(s) for s in codes.shape)
    lead = lead if index is None else []
    bits, blocks = codes.dtype.bits, -(-k // size)
    each = size * bits // 8
    shape = (*lead, n, blocks * each) if flat else (*lead, n, blocks, each)
    # which stored block each of the operators' blocks lies in
    within = torch.arange(blocks) * size // block[1]

    def pick(t: torch.Tensor) -> torch.Tensor:
        return t if rows is None else t.index_select(-2, rows)

    def pack(t: torch.Tensor) -> torch.Tensor:
        t = pick(t.view(torch.int8))
        t = F.pad(t, (0, blocks * size - k)) if blocks * size > k else t
        if bits == 8:
            return (t.view(torch.uint8) ^ 128).reshape(shape)
        t = (t + 8).view(torch.uint8)
        return (t[..., 0::2] | t[..., 1::2] << 4).reshape(shape)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return pick(t.repeat_interleave(block[0], dim=-2)[..., :n, :]).index_select(-1, within)

    name = f"{key}.nbits{size}"
    packed = e.stored(codes, name, shape, pack, index=index, dtype=DType.U8, widened=DType.U8)
    # one scale may serve weights of other heights, in other blocks
    by = f"{name}.{n}by{block[0]}x{block[1]}"
    return packed, e.stored(scale, by, (*lead, n, blocks), spread, index=index)
