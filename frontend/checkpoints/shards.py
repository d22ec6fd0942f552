"""The safetensors files of a checkpoint folder: what tensors there are, and their bytes when they are asked for."""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.files import CheckpointFolder, is_plain
from moec.ir import CompileError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KEPT_MAPPED = 32  # at most one part in so many of a file stays mapped when nothing of it is in use
HEADER_LIMIT = 32 << 20  # bytes; a header is text about its tensors, some 150 bytes each

_DTYPES = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8e4m3fn", "F8_E5M2": "f8e5m2",
    "F8_E8M0": "f8e8m0fnu", "I64": "i64", "I32": "i32", "I16": "i16", "I8": "i8", "U8": "u8", "BOOL": "bool",
}  # fmt: skip


class Shard:
    """One safetensors file, held open: what was checked is what is read, whatever its name leads to later.

    Tensors are views of a mapping of the file, which is given up whenever a part of the file has been read through it:
    what a backend has taken over would otherwise stay in memory here as well, for as long as the model lives.
    """

    def __init__(self, name: str, file: IO[bytes]):
        self.name, self.file = name, file
        self.size = os.fstat(file.fileno()).st_size
        self._lock = threading.Lock()
        self._mapped: Any = None
        self._left = 0

    def read(self, key: str) -> torch.Tensor:
        """A tensor, mapped for as long as it lives. Raises CompileError."""
        with self._lock:
            try:
                if self._mapped is None:
                    self._mapped, self._left = self.mapping(), self.size // KEPT_MAPPED
                tensor = self._mapped.get_tensor(key)
            except (SafetensorError, OSError, RuntimeError) as e:
                raise CompileError(f"cannot read {key} of {self.name}: {e}", code="checkpoint") from None
            self._left -= tensor.nbytes
            if self._left <= 0:
                self._mapped = None
            return tensor

    def mapping(self) -> Any:
        """The file as the library opens it."""
        return safe_open(f"/dev/fd/{self.file.fileno()}", framework="pt")


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a checkpoint: its dtype and shape as the file says them. `dtype` is the name of an IR dtype, or what
    the file calls a dtype that is none."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard

    def load(self) -> torch.Tensor:
        """The tensor in its stored dtype, mapped from the file."""
        return self.shard.read(self.name)


def read_shards(folder: CheckpointFolder, problems: Problems) -> dict[str, Stored]:
    """Every tensor by its name. Complaints (a missing or damaged shard, a tensor that the index places wrongly or that
    two shards hold) go to `problems`. Where there are both, the single file counts, as in transformers."""
    if folder.has(SINGLE):
        return {t.name: t for t in _open(folder, SINGLE, problems) or ()}
    if folder.has(INDEX):
        return _indexed(folder, problems)
    pickles = folder.pickles()
    if pickles:
        problems.add(
            f"{pickles[0]} is not safetensors: pickle files can run code when they are read and are never opened; "
            "convert it, in transformers with model.save_pretrained(folder)"
        )
    else:
        problems.add(f"neither {INDEX} nor {SINGLE} is there")
    problems.stop()


def _indexed(folder: CheckpointFolder, problems: Problems) -> dict[str, Stored]:
    places = folder.json(INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        problems.add(f"{INDEX}: weight_map must be an object of tensor names and file names")
        problems.stop()
    found: dict[str, Stored] = {}
    unreadable = set()
    for name in dict.fromkeys(places.values()):
        tensors = _open(folder, name, problems)
        if tensors is None:
            unreadable.add(name)
            continue
        for t in tensors:
            if t.name in found:
                problems.add(f"{t.name} is in {found[t.name].shard.name} and in {name}")
            elif places.get(t.name) != name:
                said = f"in {places[t.name]}" if t.name in places else "nowhere"
                problems.add(f"{t.name} is in {name}, {INDEX} says {said}")
            found[t.name] = t
    for key, name in places.items():
        if key not in found and name not in unreadable:
            problems.add(f"{key} is not in {name}, where {INDEX} says it is")
    return found


def _open(folder: CheckpointFolder, name: str, problems: Problems) -> list[Stored] | None:
    """The tensors of one file, None where it cannot be read."""
    if not is_plain(name) or not name.endswith(".safetensors"):
        shown = name if len(name) <= 100 else f"{name[:97]}..."
        problems.add(f"{INDEX} names the file {shown!r}, expected the name of a .safetensors file in the folder")
        return None
    try:
        with folder.opened(name) as fd:
            file = os.fdopen(os.dup(fd), "rb")
    except CompileError as e:
        problems.add(e.message)
        return None
    try:
        return list(_tensors(Shard(name, file)))
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        problems.add(f"{name}: {e}")
        file.close()
        return None


def _tensors(shard: Shard) -> list[Stored]:
    """What the header says. Raises ValueError or the library's error for a file that is damaged: sizes, offsets and
    overlaps are checked by the library."""
    head = os.pread(shard.file.fileno(), 8, 0)
    if len(head) < 8:
        raise ValueError("no safetensors file, it has less than 8 bytes")
    (length,) = struct.unpack("<Q", head)
    if length > shard.size - 8:
        raise ValueError(f"truncated: its header has {length} bytes, the file {shard.size}")
    if length > HEADER_LIMIT:
        raise ValueError(f"its header has {length} bytes, more than {HEADER_LIMIT}")
    found = []
    with shard.mapping() as mapped:
        for key in mapped.keys():  # noqa: SIM118  (it is no mapping)
            at = mapped.get_slice(key)
            kind = at.get_dtype()
            found.append(Stored(key, _DTYPES.get(kind, kind), tuple(at.get_shape()), shard))
    return found
