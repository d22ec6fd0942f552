"""Tensors on disk, one file each, so that a comparison holds two at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moec.ir import CompileError, DType, Graph, TensorType, Value
from moec.ir.arrays import BYTES, as_bytes, from_bytes

_KEY, _DTYPE = "tensor", "dtype"


class Store:
    """A folder of tensors by name. `types` holds what was put, and what a folder already held when it was opened."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.types: dict[str, TensorType] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.types[path.stem] = TensorType.of(self.get(path.stem))

    def put(self, name: str, tensor: torch.Tensor) -> None:
        held = tensor.detach().cpu().contiguous()
        try:
            dtype = DType.of(held.dtype)
            if dtype in BYTES:  # the library knows no type below 8 bits
                save_file({_KEY: as_bytes(held)}, self._path(name), {_DTYPE: str(dtype)})
            else:
                save_file({_KEY: held}, self._path(name))
        except (OSError, SafetensorError) as e:
            raise CompileError(
                f"cannot write {TensorType.of(held)} to {self.folder}: {e}",
                code="compare",
                hint="values inside go through files: save=folder or TMPDIR names another place for them",
            ) from None
        self.types[name] = TensorType.of(held)

    def get(self, name: str) -> torch.Tensor:
        """The tensor, memory-mapped."""
        with safe_open(self._path(name), framework="pt") as file:
            said = (file.metadata() or {}).get(_DTYPE)
            tensor = file.get_tensor(_KEY)
            return tensor if said is None else from_bytes(tensor, DType.of(said))

    def __contains__(self, name: str) -> bool:
        return name in self.types

    def __iter__(self) -> Iterator[str]:
        return iter(self.types)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Values:
    """The values of one graph in a store, by their place in it: inputs first, then results in order. `legal_for`: the
    backend that the graph was legalised for, `tuning`: with how many of its passes (see `Settings`)."""

    def __init__(self, graph: Graph, store: Store, legal_for: str = "reference", tuning: int | None = None):
        self.graph, self.store, self.legal_for, self.tuning = graph, store, legal_for, tuning
        self.index = {v: i for i, v in enumerate(ordered(graph))}

    def put(self, value: Value, tensor: torch.Tensor) -> None:
        self.store.put(f"v{self.index[value]}", tensor)

    def get(self, value: Value) -> torch.Tensor:
        if value.weight is not None:
            return value.weight.load()
        return self.store.get(f"v{self.index[value]}")

    def __contains__(self, value: Value) -> bool:
        return value.weight is not None or f"v{self.index[value]}" in self.store

    def type(self, value: Value) -> TensorType:
        """The actual type: every size is a number."""
        return value.type if value.weight is not None else self.store.types[f"v{self.index[value]}"]

    def output(self, i: int) -> torch.Tensor:
        return self.store.get(f"output{i}")


def ordered(graph: Graph) -> list[Value]:
    """Inputs and node results of a graph in order: what an index of a value counts."""
    return [*graph.inputs, *(r for n in graph.nodes for r in n.results)]
