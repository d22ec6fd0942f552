"""`extern`: ATen ops outside of our families, as torch defines them.

Every row of `NAMES` becomes an op `extern.aten_<name>` (`extern.aten_<name>_<overload>`). Its operands and attributes
are those of torch's schema; `types` holds the result types, which only torch knows; the reference is the torch op.
What is in `FORMS` too decomposes to ops of other families.
Complex tensors are pairs: f32[…, 2] holds real and imaginary parts, and `complex` lists the operands that are such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, Operands, OptionalOperand, op
from moec.ir.ops import bessel_forms, lu_forms, polynomial_forms, reflection_forms  # noqa: F401  (they add forms)
from moec.ir.ops.linalg_forms import MATRIX_FORMS
from moec.ir.ops.spatial_forms import SPATIAL_FORMS
from moec.ir.ops.special_forms import FORMS as SPECIAL_FORMS
from moec.ir.types import DType, TensorType

# convolution, pooling, sampling
_VISION = (
    "convolution", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d", "max_unpool3d", "grid_sampler_2d",
    "grid_sampler_3d", "col2im", "im2col", "max_pool2d_with_indices_backward", "upsample_nearest1d.vec",
    "upsample_nearest2d.vec", "upsample_nearest3d.vec", "upsample_linear1d.vec", "upsample_bilinear2d.vec",
    "upsample_trilinear3d.vec", "upsample_bicubic2d.vec", "_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip

# decompositions and solvers
_LINALG = (
    "_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_eigvals", "_linalg_eigvals", "linalg_qr", "geqrf",
    "linalg_inv", "linalg_solve", "linalg_cholesky", "linalg_lu_factor", "linalg_ldl_factor", "linalg_eigh",
    "linalg_eigvalsh", "linalg_svd", "linalg_svdvals", "linalg_det", "linalg_slogdet", "linalg_solve_ex",
    "linalg_tensorinv", "linalg_matrix_rank", "linalg_householder_product", "ormqr",
    "linalg_cholesky_ex", "cholesky", "cholesky_inverse", "cholesky_solve", "linalg_lu_factor_ex", "linalg_lu_solve",
    "linalg_lu", "lu_unpack", "linalg_ldl_factor_ex", "linalg_ldl_solve", "linalg_inv_ex", "_linalg_solve_ex",
    "linalg_solve_triangular", "triangular_solve", "linalg_lstsq", "_linalg_det", "_linalg_slogdet",
    "linalg_matrix_exp", "linalg_pinv.atol_rtol_tensor", "_cdist_forward", "_pdist_forward",
)  # fmt: skip

_FFT = ("_fft_r2c", "_fft_c2c", "_fft_c2r")

# functions of one or two numbers
_SPECIAL = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "atan2", "cosh", "sinh", "erfc", "erfinv", "lgamma", "digamma",
    "polygamma", "igamma", "igammac", "i0", "special_i0e", "special_i1", "special_i1e", "special_erfcx",
    "special_ndtri", "special_log_ndtr", "special_zeta", "special_airy_ai", "special_bessel_j0", "special_bessel_j1",
    "special_bessel_y0", "special_bessel_y1", "special_modified_bessel_i0", "special_modified_bessel_i1",
    "special_modified_bessel_k0", "special_modified_bessel_k1", "special_scaled_modified_bessel_k0",
    "special_scaled_modified_bessel_k1", "special_spherical_bessel_j0", "special_chebyshev_polynomial_t",
    "special_chebyshev_polynomial_u", "special_chebyshev_polynomial_v", "special_chebyshev_polynomial_w",
    "special_shifted_chebyshev_polynomial_t", "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v", "special_shifted_chebyshev_polynomial_w",
    "special_hermite_polynomial_h", "special_hermite_polynomial_he", "special_laguerre_polynomial_l",
    "special_legendre_polynomial_p", "nextafter", "frexp.Tensor",
)  # fmt: skip

# selection, counting, segments
_OTHER = (
    "mode", "nonzero_static", "segment_reduce",
    "histc", "histogram.bin_ct", "histogram.bins_tensor", "_histogramdd_bin_edges", "_histogramdd_from_bin_cts",
    "_histogramdd_from_bin_tensors", "_embedding_bag", "_embedding_bag_forward_only", "_ctc_loss", "_ctc_loss.Tensor",
    "renorm", "_sparse_mm_reduce_impl", "angle", "masked_scatter",
)  # fmt: skip

# how an op is said in ops of other families, for backends that lack it
FORMS = SPECIAL_FORMS | MATRIX_FORMS | SPATIAL_FORMS

NAMES = (*_VISION, *_LINALG, *_FFT, *_SPECIAL, *_OTHER)

_IGNORED = ("layout", "device", "pin_memory", "memory_format", "generator", "out")  # of schemas: nothing about values
_OPERANDS = {"Tensor": Operand, "Optional[Tensor]": OptionalOperand, "List[Tensor]": Operands}
_ANY: Any = Attr[Any]  # type: ignore[misc]  # built once, annotates generated classes


def op_of(name: str) -> str:
    """The IR op of "linalg_qr" or "median.dim"."""
    return "extern.aten_" + name.replace(".", "_")


def overload(name: str) -> Any:
    """torch's op of a name in the table."""
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), variant or "default")


def _declare(name: str) -> None:
    target = overload(name)
    arguments = [a for a in target._schema.arguments if a.name not in _IGNORED]
    fields: dict[str, Any] = {a.name: _OPERANDS.get(str(a.type), _ANY) for a in arguments}

    class Aten:
        types: Attr[tuple]
        complex: Attr[tuple] = ()

        def infer(self: Any) -> tuple[TensorType, ...]:
            require(self.types and all(isinstance(t, TensorType) for t in self.types), "types must be tensor types")
            return self.types

        def reference(self: Any) -> tuple[torch.Tensor, ...]:
            return call(target, {k: getattr(self, k) for k in fields}, self.complex)

    Aten.__annotations__ = fields | {"types": Attr[tuple], "complex": Attr[tuple]}
    for a in arguments:
        if fields[a.name] is _ANY and a.has_default_value():
            setattr(Aten, a.name, attribute(a.default_value))
    if name in FORMS:

        def decompose(self: Any, b: Any) -> Any:
            return FORMS[name](self, b)

        Aten.decompose = decompose  # type: ignore[attr-defined]  # only ops that have a form get one
    Aten.__doc__ = f"torch's {target._schema}"
    op(op_of(name), results=None)(Aten)


def call(target: Any, arguments: dict[str, Any], pairs: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:
    """Run a torch op on operands (the `pairs` among them are complex) and attributes; its tensors, complex as pairs."""
    place = 0

    def tensor(x: torch.Tensor | None) -> torch.Tensor | None:
        nonlocal place
        place += 1
        return torch.view_as_complex(x.contiguous()) if x is not None and place - 1 in pairs else x

    given: dict[str, Any] = {}
    for a in target._schema.arguments:
        if a.name not in arguments:
            continue
        value, kind = arguments[a.name], _OPERANDS.get(str(a.type))
        if kind is Operands:
            given[a.name] = [tensor(x) for x in value]
        else:
            given[a.name] = tensor(value) if kind is not None else plain(value)
    positional = [given.pop(a.name) for a in target._schema.arguments if a.name in given and not a.kwarg_only]
    return tuple(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in _tensors(
        target(*positional, **given)))  # fmt: skip


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for x in result:
            yield from _tensors(x)


def attribute(value: Any) -> Any:
    """A torch argument that is no tensor, as the IR holds it."""
    if isinstance(value, list | tuple):
        return tuple(map(attribute, value))
    return DType.of(value) if isinstance(value, torch.dtype) else value


def plain(value: Any) -> Any:
    """An attribute as torch takes it."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value.torch if isinstance(value, DType) else value


for _name in NAMES:
    _declare(_name)
