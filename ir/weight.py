"""Weights: a name, a type, and a source whose bytes are read only when a backend needs them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from moec.ir.arrays import from_bytes, unpacked
from moec.ir.errors import CompileError
from moec.ir.types import DType, TensorType

# set while weights are read as their exact values, see `loading_in_float64`
_in_float64: ContextVar[bool] = ContextVar("in_float64", default=False)


@contextmanager
def loading_in_float64() -> Iterator[None]:
    """Inside, `Weight.load` widens floats to float64 (8-bit codes stay), and computed weights are computed
    anew from the widened ones: what a fold of weights means, without the rounding of its dtype."""
    token = _in_float64.set(True)
    try:
        yield
    finally:
        _in_float64.reset(token)


# set while computed weights are read once and not kept, see `loading_once`
_once: ContextVar[bool] = ContextVar("once", default=False)


@contextmanager
def loading_once() -> Iterator[None]:
    """Inside, a computed weight is not kept after `Weight.load`: for passing weights on, one at a time."""
    token = _once.set(True)
    try:
        yield
    finally:
        _once.reset(token)


class WeightSource(Protocol):
    """Where bytes come from."""

    def load(self) -> torch.Tensor:
        """The tensor, in its stored dtype, on CPU."""
        ...


@dataclass(frozen=True, eq=False)
class TensorSource:
    """A live torch tensor (shared, not copied; detached), which may change until it is first read.

    After that, some backends and passes hold what they have read and others would read it again: they would not compute
    on one state of the model.
    """

    tensor: torch.Tensor
    name: str = ""
    _read_at: list[int] = field(default_factory=list, repr=False)

    def load(self) -> torch.Tensor:
        """Raises CompileError where the tensor was written to since it was first read (not seen: through `.data`)."""
        if not self.tensor.is_inference():
            now = self.tensor._version
            if self._read_at and self._read_at[0] != now:
                raise CompileError(
                    f"weight {self.name!r} was modified in place after it had been read",
                    code="weight-changed",
                    hint="compile the model again to use its new weights",
                )
            self._read_at[:] = [now]
        return self.tensor.detach()


@dataclass(frozen=True)
class SafetensorsSource:
    """One tensor of a safetensors file, memory-mapped by the library. With `file`, the open one: what was checked stays
    what is read, whatever the name leads to later. `digest`: of the tensor, where the file's own was checked."""

    path: Path
    key: str
    file: Any = field(default=None, compare=False, repr=False)
    digest: str | None = field(default=None, compare=False, repr=False)

    def load(self) -> torch.Tensor:
        if self.file is not None:
            return self.file.get_tensor(self.key)
        with safe_open(self.path, framework="pt") as f:
            return f.get_tensor(self.key)


@dataclass(frozen=True)
class PackedSource:
    """A weight of `type`, of less than 8 bits, that a file holds packed (`moec.ir.arrays.packed`). `digest`: of the
    weight, not of what is packed, where the file's own was checked."""

    source: WeightSource
    type: TensorType
    digest: str | None = field(default=None, compare=False, repr=False)

    def load(self) -> torch.Tensor:
        return unpacked(self.source.load(), self.type)


@dataclass(frozen=True)
class BytesSource:
    """A weight of a dtype of less than 8 bits that a file holds as 8-bit integers."""

    source: WeightSource
    dtype: DType

    def load(self) -> torch.Tensor:
        return from_bytes(self.source.load(), self.dtype)


@dataclass(eq=False)
class ComputedSource:
    """Derived from other weights when first asked for; kept afterwards. `of` and `how`: those weights, and as text what
    is made of them, where both together say what the data is; then nobody has to compute it to know it again."""

    compute: Callable[[], torch.Tensor]
    of: tuple[Weight, ...] = ()
    how: str = ""
    _value: torch.Tensor | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def load(self) -> torch.Tensor:
        if _in_float64.get():
            return self.compute()
        with self._lock:
            if self._value is not None:
                return self._value
            value = self.compute()
            if not _once.get():
                self._value = value
            return value


@dataclass(eq=False)
class StackedSource:
    """Tensors of one type along a new first axis: experts that a checkpoint stores one by one.

    `part` reads one of them; `load` reads them one after another into the whole, which is kept (not within
    `loading_once`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Sequence[Callable[[], torch.Tensor]]
    _value: torch.Tensor | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def part(self, index: int) -> torch.Tensor:
        return self.parts[index]() if self._value is None or _in_float64.get() else self._value[index]

    def load(self) -> torch.Tensor:
        if _in_float64.get():
            return torch.stack([read() for read in self.parts])
        with self._lock:
            if self._value is not None:
                return self._value
            value = torch.empty(self.shape, dtype=self.dtype)
            for i, read in enumerate(self.parts):
                value[i].copy_(read())
            if not _once.get():
                self._value = value
            return value


@dataclass(frozen=True, eq=False)
class BlockScaledSource:
    """A weight that is stored as E4M3 codes [..., R, C] and one scale per `block` of rows × columns, f32
    [..., ⌈R/rows⌉, ⌈C/columns⌉] (DeepSeek-V3 technical report, §3.3); read as codes · scale in `dtype`."""

    codes: Weight
    scale: Weight
    block: tuple[int, int]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        return self._product(self.codes.load(), self.scale.load())

    def part(self, index: int) -> torch.Tensor:
        """Matrix `index` along the first axis."""
        return self._product(self.codes.part(index), self.scale.part(index))

    def _product(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows, columns = self.block
        wide = scale.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
        value = codes.to(scale.dtype) * wide[..., : codes.shape[-2], : codes.shape[-1]]
        return value if scale.dtype == torch.float64 else value.to(self.dtype)


@dataclass(frozen=True, eq=False)
class CheckedSource:
    """Another source, whose data is checked whenever it is read."""

    source: WeightSource
    check: Callable[[torch.Tensor], None]

    def load(self) -> torch.Tensor:
        tensor = self.source.load()
        if tensor.device.type != "meta":
            self.check(tensor)
        return tensor


@dataclass(frozen=True, eq=False)
class Weight:
    """A named constant tensor of a model. `source` is None where only the type is known (parsed text,
    meta tensors); `digest` is the SHA-256 of dtype, shape and bytes where it was computed."""

    name: str
    type: TensorType
    source: WeightSource | None = None
    digest: str | None = None

    def load(self) -> torch.Tensor:
        """The data. Raises CompileError if there is none or it does not have the declared type."""
        if self.source is None:
            raise CompileError(
                f"weight {self.name!r} has no data", code="weight", hint="bind weights with graph.bind_weights(...)"
            )
        tensor = self.source.load()
        stored = TensorType.of(tensor)
        if _in_float64.get() and self.type.dtype.is_float and self.type.dtype.bits > 8:
            tensor = tensor.to(torch.float64)
            stored = stored.with_dtype(self.type.dtype)
        if stored != self.type:
            raise CompileError(
                f"weight {self.name!r} is declared {self.type} but its data is {TensorType.of(tensor)}", code="weight"
            )
        if tensor.device.type == "meta":
            raise CompileError(f"weight {self.name!r} is a meta tensor without data", code="weight")
        return tensor

    def part(self, index: int) -> torch.Tensor:
        """The data at `index` of the first axis, without reading the rest where the source can. Raises as `load`."""
        read = getattr(self.source, "part", None)
        if read is None:
            return self.load()[index]
        return Weight(f"{self.name}[{index}]", self.type.with_shape(self.type.shape[1:]), _Part(read, index)).load()

    def with_digest(self) -> Weight:
        """The same weight with its digest computed (reads the data)."""
        return Weight(self.name, self.type, self.source, self.digest or digest(self.load()))

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Weight:
        return Weight(name, TensorType.of(tensor), TensorSource(tensor, name))

    def __eq__(self, other: object) -> bool:
        """Same name and type, and same digest where both have one."""
        if not isinstance(other, Weight):
            return NotImplemented
        same = self.name == other.name and self.type == other.type
        return same and (self.digest is None or other.digest is None or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash((self.name, self.type))


@dataclass(frozen=True, eq=False)
class _Part:
    read: Callable[[int], torch.Tensor]
    index: int

    def load(self) -> torch.Tensor:
        return self.read(self.index)


def joined_rows(weights: Iterable[Weight]) -> ComputedSource:
    """Rows of several weights [R, ...] of one dtype, one weight after the other."""
    held = tuple(weights)
    return ComputedSource(lambda: torch.cat([w.load() for w in held]), held, "joined rows")


def ordered_rows(weight: Weight, order: torch.Tensor) -> ComputedSource:
    """The rows of a weight [R, ...] that i64 `order` names, in its order."""
    return ComputedSource(lambda: weight.load().index_select(0, order), (weight,), f"rows {digest(order)}")


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a tensor."""
    h = hashlib.sha256(str(TensorType.of(tensor)).encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()
