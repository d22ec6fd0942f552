"""Rotary embedding: which operator it becomes, and that all forms mean the same."""

from __future__ import annotations

import pytest
import torch

from moec.backends import get_backend
from moec.ir import parse

# x, cos: what follows the sequence or precedes it, tables for all rows or per row
SHAPES = {
    "heads first": ("[B, 4, S, 6]", "[1, 1, S, 3]", (1, 1, None, 3)),
    "heads first, per row": ("[B, 4, S, 6]", "[B, 1, S, 3]", ("B", 1, None, 3)),
    "rank 2": ("[B, 4, S, 6]", "[S, 3]", (None, 3)),
    "heads last": ("[B, S, 4, 6]", "[1, S, 1, 3]", (1, None, 1, 3)),
    "heads last, per row": ("[B, S, 4, 6]", "[B, S, 1, 3]", ("B", None, 1, 3)),
}
OTHERS = {
    "one angle for all positions": ("[B, 4, S, 6]", "[1, 1, 1, 3]", (1, 1, 1, 3)),
    "per head": ("[B, 4, S, 6]", "[1, 4, S, 3]", (1, 4, None, 3)),
    "rank 3": ("[B, S, 6]", "[1, S, 3]", (1, None, 3)),
}


def graph(x: str, cos: str, attrs: str, dtype: str = "f32"):
    return parse(
        f"""graph(%x: {dtype}{x}, %c: {dtype}{cos}, %s: {dtype}{cos}) -> (%y: {dtype}{x}) {{
  %0: {dtype}{x} = rope.apply(%x, %c, %s) {{{attrs}}}
  return %0
}}"""
    )


def tensors(x: str, cos: tuple, batch: int, length: int, dtype=torch.float32):
    named = {"B": batch, "S": length, None: length}
    shape = [named[s] if s in named else int(s) for s in x.strip("[]").split(", ")]
    angle = torch.randn([named.get(c, c) for c in cos])
    return [t.to(dtype) for t in (torch.randn(shape), angle.cos(), angle.sin())]


def operators(g, **options):
    from moec.backends.onnxruntime.lower import lower
    from moec.backends.onnxruntime.options import Options

    return [n.op_type for n in lower(g, Options(**options), get_backend("onnxruntime")).model.graph.all_nodes()]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("attrs", ["", "interleaved=true", "interleaved=true, deinterleave=true"])
@pytest.mark.parametrize("name", [*SHAPES, *OTHERS])
def test_all_forms_are_the_reference(name, attrs, portable):
    x, cos, sizes = (SHAPES | OTHERS)[name]
    g = graph(x, cos, attrs)
    program = get_backend("onnxruntime").compile(g, options={"portable": portable})
    reference = get_backend("reference").compile(g)
    for batch, length in ((2, 5), (1, 1), (3, 1), (1, 300), (0, 4), (2, 0)):
        torch.manual_seed(0)
        given = tensors(x, sizes, batch, length)
        (got,), (want,) = program.run(given), reference.run(given)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert ("RotaryEmbedding" in operators(g, portable=portable)) == (name in SHAPES and "deint" not in attrs)


def test_other_positions_are_seen():
    """The comparison above fails where a row's angles are another's."""
    x, cos, sizes = SHAPES["heads first, per row"]
    g = graph(x, cos, "")
    torch.manual_seed(0)
    x_, c, s = tensors(x, sizes, 2, 5)
    (got,) = get_backend("onnxruntime").compile(g).run([x_, c.flip(0), s.flip(0)])
    (want,) = get_backend("reference").compile(g).run([x_, c, s])
    assert not torch.allclose(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f64"])
def test_other_floats(dtype):
    x, cos, sizes = SHAPES["heads first"]
    g = graph(x, cos, "", dtype)
    torch.manual_seed(0)
    given = tensors(x, sizes, 2, 7, {"bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}[dtype])
    (got,), (want,) = get_backend("onnxruntime").compile(g).run(given), get_backend("reference").compile(g).run(given)
    assert got.dtype == want.dtype
    # the reference rounds each product to `dtype`, the session computes in f32
    torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(want.dtype).eps)
    assert ("RotaryEmbedding" in operators(g)) == (dtype != "f64")
