"""`math`: reductions, softmax, scans, sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moec.ir.errors import require
from moec.ir.opdef import Attr, Operand, op
from moec.ir.ops.overflow import overflows
from moec.ir.types import DType, TensorType


def normal_axis(axis: int, rank: int) -> int:
    """A non-negative axis. Raises CompileError where it is out of range."""
    require(-rank <= axis < rank, f"axis {axis} is out of range for rank {rank}")
    return axis % rank if rank else 0


def _reduction(name: str, doc: str, fn: Callable[..., torch.Tensor], kinds: str, needs_elements: bool = False) -> None:
    class Reduction:
        x: Operand
        axes: Attr[tuple[int, ...]]
        keepdim: Attr[bool] = False

        def infer(self: Any) -> TensorType:
            d = self.x.dtype
            kind = "f" if d.is_wide_float else "b" if d is DType.BOOL else "i" if d.is_integer else "-"
            require(kind in kinds, f"does not take {self.x.dtype}")
            axes = {normal_axis(a, self.x.rank) for a in self.axes}
            require(len(axes) == len(self.axes), f"axes {self.axes} repeat")
            if needs_elements:
                require(all(self.x.shape[a] != 0 for a in axes), "reduces an axis of size 0")
            kept = [(1 if i in axes else s) for i, s in enumerate(self.x.shape) if self.keepdim or i not in axes]
            return self.x.with_shape(kept)

        def reference(self: Any) -> torch.Tensor:
            if not self.axes:
                return self.x.clone()
            return fn(self.x, dim=self.axes, keepdim=self.keepdim).to(self.x.dtype)

        def undefined(self: Any) -> bool:
            return overflows(self.x)

        @staticmethod
        def samples(r: Any) -> Any:
            x = r.bools(r.n, r.m, r.k) if kinds == "b" else r.floats(r.n, r.m, r.k)
            if name == "prod":  # near 1, so that products of many are numbers in narrow floats too
                x = 1 + x / 8
            yield [x], {"axes": (-1,), "keepdim": True}
            yield [x], {"axes": (1, 2)}
            if r.n or not needs_elements:
                yield [x], {"axes": (0,)}
            if "i" in kinds:
                yield [r.ints(-9, 9, r.n, r.m)], {"axes": (1,)}

    Reduction.__doc__ = f"{doc} over `axes` (empty: none); result dtype is the operand's."
    op(f"math.{name}")(Reduction)


def _all(x: torch.Tensor, dim: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return torch.all(x, dim=dim, keepdim=keepdim)


def _any(x: torch.Tensor, dim: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return torch.any(x, dim=dim, keepdim=keepdim)


def _prod(x: torch.Tensor, dim: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    for axis in sorted((a % x.dim() for a in dim), reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keepdim)
    return x


_reduction("sum", "Sum", torch.sum, "fi")
_reduction("prod", "Product", _prod, "fi")
_reduction("mean", "Mean", torch.mean, "f")
_reduction("amax", "Maximum", torch.amax, "fi", needs_elements=True)
_reduction("amin", "Minimum", torch.amin, "fi", needs_elements=True)
_reduction("all", "Logical and", _all, "b")
_reduction("any", "Logical or", _any, "b")


def _along_axis(name: str, doc: str, fn: Callable[..., torch.Tensor], floats_only: bool) -> None:
    class AlongAxis:
        x: Operand
        axis: Attr[int] = -1

        def infer(self: Any) -> TensorType:
            require(self.x.dtype.is_wide_float or (not floats_only and self.x.dtype.is_integer), f"got {self.x.dtype}")
            normal_axis(self.axis, self.x.rank)
            return self.x

        def reference(self: Any) -> torch.Tensor:
            return fn(self.x, dim=self.axis).to(self.x.dtype)

        def undefined(self: Any) -> bool:
            # softmax: a row of −∞ is 0 / 0, for which attention gives zeros
            dead = floats_only and self.x.numel() and bool((self.x == float("-inf")).all(self.axis).any())
            return bool(dead) or overflows(self.x)

        @staticmethod
        def samples(r: Any) -> Any:
            yield [r.floats(r.n, r.m, r.k)], {}
            yield [r.floats(r.n, r.k)], {"axis": 0}
            if not floats_only:
                yield [r.ints(0, 9, r.n, r.m)], {"axis": 1}

    AlongAxis.__doc__ = f"{doc} along `axis`."
    op(f"math.{name}")(AlongAxis)


_along_axis("softmax", "exp(x − max) / Σ exp(x − max)", torch.softmax, True)
_along_axis("log_softmax", "ln softmax(x)", torch.log_softmax, True)
_along_axis("cumsum", "Inclusive running sum", torch.cumsum, False)


@op("math.argmax")
class ArgMax:
    """Index of the (first) maximum along `axis`, i64."""

    x: Operand
    axis: Attr[int] = -1
    keepdim: Attr[bool] = False

    def infer(self) -> TensorType:
        axis = normal_axis(self.axis, self.x.rank)
        require(self.x.dtype.is_wide_float or self.x.dtype.is_integer, f"takes numbers, got {self.x.dtype}")
        require(self.x.shape[axis] != 0, "reduces an axis of size 0")
        kept = [(1 if i == axis else s) for i, s in enumerate(self.x.shape) if self.keepdim or i != axis]
        return TensorType(DType.I64, tuple(kept))

    def reference(self) -> torch.Tensor:
        return torch.argmax(self.x, dim=self.axis, keepdim=self.keepdim)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k)], {}
        yield [r.floats(r.k, r.n)], {"axis": 0, "keepdim": True}


def _check_ordered(x: TensorType) -> None:
    ordered = x.dtype.is_wide_float or x.dtype.is_integer or x.dtype is DType.BOOL
    require(ordered, f"takes what has an order, got {x.dtype}")


@op("math.sort", results=2)
class Sort:
    """Stable sort along `axis` → (values, indices i64)."""

    x: Operand
    axis: Attr[int] = -1
    descending: Attr[bool] = False

    def infer(self) -> tuple[TensorType, ...]:
        normal_axis(self.axis, self.x.rank)
        _check_ordered(self.x)
        return self.x, self.x.with_dtype(DType.I64)

    def reference(self) -> tuple[torch.Tensor, ...]:
        values, indices = torch.sort(self.x, dim=self.axis, descending=self.descending, stable=True)
        return values, indices

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k)], {}
        yield [r.ints(0, 4, r.n)], {"axis": 0}
        yield [r.ints(0, 4, r.n, r.k)], {"descending": True}


@op("math.topk", results=2)
class TopK:
    """The `k` largest (or smallest) along `axis`, in order → (values, indices i64); ties: lower index first."""

    x: Operand
    k: Attr[int]
    axis: Attr[int] = -1
    largest: Attr[bool] = True

    def infer(self) -> tuple[TensorType, ...]:
        axis = normal_axis(self.axis, self.x.rank)
        extent = self.x.shape[axis]
        _check_ordered(self.x)
        require(self.k >= 0 and (not isinstance(extent, int) or self.k <= extent), f"k={self.k} of {extent} elements")
        shape = [self.k if i == axis else s for i, s in enumerate(self.x.shape)]
        return self.x.with_shape(shape), TensorType(DType.I64, tuple(shape))

    def reference(self) -> tuple[torch.Tensor, ...]:
        values, indices = torch.sort(self.x, dim=self.axis, descending=self.largest, stable=True)
        return values.narrow(self.axis, 0, self.k), indices.narrow(self.axis, 0, self.k)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, r.k)], {"k": min(3, r.k)}
        yield [r.floats(r.n, r.k).round()], {"k": r.k}
        yield [r.floats(r.k, r.n)], {"k": 1, "axis": 0, "largest": False}
