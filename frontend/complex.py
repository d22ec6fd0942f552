"""Complex tensors as pairs of real ones: rotary embeddings written with torch.polar and view_as_complex."""

from __future__ import annotations

from typing import Any, NamedTuple

from moec.frontend.aten.extern import EXTERN, lower_extern
from moec.frontend.aten.registry import LOWERINGS, PARAMETERS
from moec.frontend.context import Context
from moec.ir import CompileError, DType, TensorType, Value

# ops that only move elements act on both parts alike
_STRUCTURAL = {
    f"aten::{n}"
    for n in (
        "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "permute",
        "transpose.int", "t", "expand", "repeat", "slice.Tensor", "select.int", "cat", "stack", "index.Tensor",
        "index_select", "clone", "alias", "detach", "contiguous", "split.Tensor", "split_with_sizes", "unbind.int",
        "flip", "roll", "embedding", "constant_pad_nd", "index_put", "slice_scatter", "select_scatter",
    )
}  # fmt: skip
_REAL = {DType.C64: DType.F32}
COMPLEX_ONLY = {
    f"aten::{n}"
    for n in (
        "polar",
        "complex",
        "view_as_complex",
        "view_as_real",
        "real",
        "imag",
        "_conj",
        "conj_physical",
        "_conj_physical",
    )
}


class Complex(NamedTuple):
    """re + i·im"""

    re: Value
    im: Value


def involves_complex(c: Context, name: str, arguments: dict[str, Any]) -> bool:
    outs = c.out if isinstance(c.out, list) else [c.out]
    if name in COMPLEX_ONLY or any(isinstance(t, TensorType) and t.dtype in _REAL for t in outs):
        return True
    flat = [x for v in arguments.values() for x in (v if isinstance(v, list | tuple) else (v,))]
    return any(isinstance(x, Complex) for x in [*arguments.values(), *flat])


def lower_complex(c: Context, name: str, arguments: dict[str, Any]) -> Any:
    """The op on pairs. Raises CompileError for what has no rule here."""
    b, a = c.b, arguments
    x: Any = a.get("self", a.get("input"))
    match name:
        case "aten::polar":
            return Complex(b.mul(a["abs"], b.cos(a["angle"])), b.mul(a["abs"], b.sin(a["angle"])))
        case "aten::complex":
            shape = c.out_type.shape
            return Complex(c.expand(a["real"], shape), c.expand(a["imag"], shape))
        case "aten::view_as_complex":
            return parts(c, x)
        case _ if name in COMPLEX_ONLY and isinstance(x, Value):  # of real numbers: themselves
            return x
        case "aten::view_as_real":
            return interleaved(c, x)
        case "aten::real":
            return x.re
        case "aten::imag":
            return x.im
        case "aten::_conj" | "aten::conj" | "aten::conj_physical" | "aten::_conj_physical":
            return Complex(x.re, b.neg(x.im))
        case "aten::abs":
            return b.sqrt(b.add(b.mul(x.re, x.re), b.mul(x.im, x.im)))
        case "aten::mul.Tensor":
            return _multiply(c, a["self"], a["other"])
        case "aten::add.Tensor" | "aten::sub.Tensor" if a.get("alpha", 1) == 1:
            op = b.add if "add" in name else b.sub
            p, q = (_pair(c, v) for v in (a["self"], a["other"]))
            return Complex(op(p.re, q.re), op(p.im, q.im))
        case "aten::_to_copy" | "aten::to.dtype":
            if isinstance(c.out, TensorType) and c.out.dtype in _REAL:
                return _pair(c, x)
        case _ if name in _STRUCTURAL and not a.get("value"):  # a number that fills is real
            return _each_part(c, name, arguments)
        case _ if name in EXTERN:
            return extern(c, name, arguments)
    raise CompileError(
        f"{name}: complex tensors are only supported for rotary embeddings (polar, view_as_complex, multiply)",
        code="dtype",
        hint="write the computation with real tensors (cos, sin)",
    )


def interleaved(c: Context, x: Complex) -> Value:
    """f32[…, 2]: torch.view_as_real."""
    return c.concat([c.reshape(p, (*p.shape, 1)) for p in x], x.re.type.rank)


def parts(c: Context, x: Value) -> Complex:
    """torch.view_as_complex of f32[…, 2]."""
    re, im = c.b.split(x, axis=x.type.rank - 1, sizes=(1, 1))
    return Complex(c.reshape(re, x.shape[:-1]), c.reshape(im, x.shape[:-1]))


def extern(c: Context, name: str, arguments: dict[str, Any]) -> Any:
    """An op that stays torch's; complex operands and results are pairs in it."""
    values = lower_extern(c, name, arguments, lambda x: interleaved(c, x) if isinstance(x, Complex) else None)
    if isinstance(c.out, TensorType):
        return parts(c, values[0]) if c.out.dtype in _REAL else values[0]
    rest = iter(values)
    return [None if t is None else parts(c, next(rest)) if t.dtype in _REAL else next(rest) for t in c.out]


def _pair(c: Context, v: Any) -> Complex:
    if isinstance(v, Complex):
        return v
    re = c.value(v, DType.F32)
    return Complex(re, c.full(re.shape, 0.0, DType.F32))


def _multiply(c: Context, p: Any, q: Any) -> Complex:
    b = c.b
    if not isinstance(p, Complex):
        p, q = q, p
    if not isinstance(q, Complex):
        r = c.value(q, DType.F32)
        return Complex(b.mul(p.re, r), b.mul(p.im, r))
    return Complex(b.sub(b.mul(p.re, q.re), b.mul(p.im, q.im)), b.add(b.mul(p.re, q.im), b.mul(p.im, q.re)))


def _each_part(c: Context, name: str, arguments: dict[str, Any]) -> Any:
    out = c.out
    c.out = [_real(t) for t in out] if isinstance(out, list) else _real(out)
    results = []
    for part in range(2):
        picked = {k: _pick(v, part) for k, v in arguments.items() if k in PARAMETERS[name]}
        results.append(LOWERINGS[name](c, **picked))
    re, im = results
    return [Complex(*p) for p in zip(re, im, strict=True)] if isinstance(re, list) else Complex(re, im)


def _pick(v: Any, part: int) -> Any:
    if isinstance(v, Complex):
        return v[part]
    return [_pick(x, part) for x in v] if isinstance(v, list) else v


def _real(t: TensorType) -> TensorType:
    return t.with_dtype(_REAL.get(t.dtype, t.dtype))
