"""Plans that several parts share: how to quantise, which machines there are, where experts live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.ir.errors import ArgumentValueError

# None, for the default that goes with `weights`: __post_init__ fills it in, so that nobody else sees it
_OF_WEIGHTS: Any = None


@dataclass(frozen=True)
class Quantization:
    """What to store in fewer bits.

    `weights`: "f8e4m3fn", "i8" or "i4" (codes and scales: see `moec.ir.ops.block_codes`). `activations`: "f8e4m3fn"
    (per token, groups of `group` channels; beside E4M3 weights only) or None for weight-only. `block`: rows × columns
    of a weight block that share one f32 scale; by default 128×128 for E4M3 (DeepSeek-V3 report, §3.3; activations
    1×128), 1×128 for i8 and 1×32 for i4; columns of integers are a multiple of 16. `keep`: dotted module paths (prefix
    match) left as they are; by default lm_head with E4M3, nothing with integers. `in_i8`: module paths stored in i8
    where the others are in i4; by default lm_head. `min_coverage`: least share of linear and expert weight bytes that
    must end up quantised.
    """

    weights: str = "f8e4m3fn"
    activations: str | None = "f8e4m3fn"
    block: tuple[int, int] = _OF_WEIGHTS
    group: int = 128
    keep: tuple[str, ...] = _OF_WEIGHTS
    min_coverage: float = 0.5
    in_i8: tuple[str, ...] = _OF_WEIGHTS

    def __post_init__(self) -> None:
        if self.weights not in _BLOCKS:
            raise ArgumentValueError(
                f"Quantization(weights={self.weights!r}) is not supported",
                code="quantize",
                hint=f"one of {', '.join(map(repr, _BLOCKS))}",
            )
        integers = self.weights != "f8e4m3fn"
        if self.activations not in (None,) if integers else self.activations not in (None, "f8e4m3fn"):
            raise ArgumentValueError(
                f"Quantization(weights={self.weights!r}, activations={self.activations!r}) is not supported",
                code="quantize",
                hint="activations=None" if integers else "activations 'f8e4m3fn' or None",
            )
        for name, default in (
            ("block", _BLOCKS[self.weights]),
            ("keep", () if integers else ("lm_head",)),
            ("in_i8", ("lm_head",) if self.weights == "i4" else ()),
        ):
            given = getattr(self, name)
            object.__setattr__(self, name, default if given is None else tuple(given))
        if self.in_i8 and self.weights != "i4":
            raise ArgumentValueError(
                f"Quantization(weights={self.weights!r}, in_i8={self.in_i8!r}): in_i8 goes with weights='i4'",
                code="quantize",
            )
        if len(self.block) != 2 or min(*self.block, self.group) < 1:
            raise ArgumentValueError(
                f"block {self.block} must be two positive numbers, rows and columns, and group {self.group} one",
                code="quantize",
            )
        if integers and self.block[1] % INTEGER_COLUMNS:
            raise ArgumentValueError(
                f"block {self.block} of weights {self.weights!r} has {self.block[1]} columns, expected a multiple of "
                f"{INTEGER_COLUMNS}",
                code="quantize",
                hint="products with integers take blocks of 16, 32, 64, 128 or 256 columns",
            )

    @staticmethod
    def of(spec: Quantization | str | None) -> Quantization | None:
        """From the `quantize=` argument. Raises ArgumentValueError on an unknown name."""
        if spec is None or isinstance(spec, Quantization):
            return spec
        named = _NAMED.get(spec) if isinstance(spec, str) else None
        if named is None:
            raise ArgumentValueError(
                f"unknown quantize={spec!r}",
                code="quantize",
                hint=f"None, {', '.join(map(repr, _NAMED))} or moec.Quantization",
            )
        return named


INTEGER_COLUMNS = 16
_BLOCKS = {"f8e4m3fn": (128, 128), "i8": (1, 128), "i4": (1, 32)}
_NAMED = {
    "fp8": Quantization(),
    "fp8-weight-only": Quantization(activations=None),
    "int8": Quantization("i8", None),
    "int4": Quantization("i4", None),
}
QUANTIZE = tuple(_NAMED)
"""What `quantize=` takes by name."""


@dataclass(frozen=True)
class Mesh:
    """The GPUs: `nodes` machines of `gpus_per_node`, each holding `slots_per_gpu` experts per layer (one
    int for all, or one per GPU)."""

    nodes: int = 1
    gpus_per_node: int = 8
    slots_per_gpu: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if isinstance(self.slots_per_gpu, list):
            object.__setattr__(self, "slots_per_gpu", tuple(self.slots_per_gpu))
        if self.nodes < 1 or self.gpus_per_node < 1 or min(self.slots) < 0 or sum(self.slots) < 1:
            raise ArgumentValueError(f"{self} needs at least one node, GPU and slot", code="mesh")
        if len(self.slots) != self.num_gpus:
            raise ArgumentValueError(
                f"slots_per_gpu has {len(self.slots)} entries for {self.num_gpus} GPUs", code="mesh"
            )

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of each GPU."""
        if isinstance(self.slots_per_gpu, tuple):
            return self.slots_per_gpu
        return (self.slots_per_gpu,) * self.num_gpus

    @property
    def num_slots(self) -> int:
        return sum(self.slots)


# what a placement is not given, __post_init__ fills in: afterwards all its fields are arrays
_FILLED_IN: Any = None


@dataclass(frozen=True, eq=False)
class Placement:
    """Which logical expert each physical slot holds; all arrays are read-only NumPy.

    `physical_to_logical` i64[L, slots]: expert ids per MoE layer, slots in GPU order. `fractions`
    f64[L, slots]: the share of its expert's tokens that a slot takes (equal shares unless given).
    `balance` f64[L]: max/mean load per GPU under the load it was made for; `lower_bound` f64[L]: what no
    placement can beat; `moves` i64[L]: slots whose expert changed against the current placement. These
    three are NaN, NaN and 0 where the placement was not made from a load.

    Raises ArgumentValueError where a shape does not fit the mesh or an expert has no slot.
    """

    mesh: Mesh
    physical_to_logical: np.ndarray
    balance: np.ndarray = _FILLED_IN
    lower_bound: np.ndarray = _FILLED_IN
    moves: np.ndarray = _FILLED_IN
    fractions: np.ndarray = _FILLED_IN

    def __post_init__(self) -> None:
        rows = _array("physical_to_logical", self.physical_to_logical, np.int64)
        if rows.ndim != 2 or rows.shape[1] != self.mesh.num_slots or not rows.size:
            raise ArgumentValueError(
                f"physical_to_logical has shape {list(rows.shape)}, expected [layers, {self.mesh.num_slots}]",
                code="placement",
                hint="one row per MoE layer, one column per slot of the mesh",
            )
        num_experts = int(rows.max()) + 1
        for layer, row in enumerate(rows):
            missing = sorted(set(range(num_experts)) - set(row.tolist()))
            if row.min() < 0 or missing:
                raise ArgumentValueError(
                    f"placement layer {layer}: experts {missing[:8] or [int(row.min())]} have no slot",
                    code="placement",
                )
        counts = np.stack([np.bincount(row, minlength=num_experts)[row] for row in rows])
        layers = len(rows)
        for name, default, shape in (
            ("balance", np.full(layers, np.nan), (layers,)),
            ("lower_bound", np.full(layers, np.nan), (layers,)),
            ("moves", np.zeros(layers, dtype=np.int64), (layers,)),
            ("fractions", 1.0 / counts, rows.shape),
        ):
            given = getattr(self, name)
            array = default if given is None else _array(name, given, default.dtype)
            if array.shape != shape:
                raise ArgumentValueError(
                    f"placement {name} has shape {list(array.shape)}, expected {list(shape)}", code="placement"
                )
            object.__setattr__(self, name, _frozen(array))
        object.__setattr__(self, "physical_to_logical", _frozen(rows))

    @property
    def num_layers(self) -> int:
        return len(self.physical_to_logical)

    @property
    def num_experts(self) -> int:
        return int(self.physical_to_logical.max()) + 1

    def tables(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Logical → physical of one layer, the operands of `moe.remap`: slots i64[E, R] (rows padded with
        their first slot) and replica counts i64[E]."""
        row = self.physical_to_logical[layer]
        count = np.bincount(row, minlength=self.num_experts)
        order = np.argsort(row, kind="stable")
        start = np.cumsum(count) - count
        column = np.arange(count.max())
        return order[start[:, None] + np.where(column < count[:, None], column, 0)], count

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        mesh = {"nodes": self.mesh.nodes, "gpus_per_node": self.mesh.gpus_per_node, "slots": list(self.mesh.slots)}
        arrays = ("physical_to_logical", "fractions", "balance", "lower_bound", "moves")
        return {"mesh": mesh, **{name: getattr(self, name).tolist() for name in arrays}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Placement:
        """Read what `to_dict` gave. Raises ArgumentValueError naming a missing or malformed field."""
        try:
            m = data["mesh"]
            mesh = Mesh(m["nodes"], m["gpus_per_node"], tuple(m["slots"]))
            names = ("balance", "lower_bound", "moves", "fractions")
            return Placement(mesh, data["physical_to_logical"], **{n: data[n] for n in names})
        except (KeyError, TypeError) as e:
            raise ArgumentValueError(f"not a placement: {e!r}", code="placement") from None


def _array(name: str, data: Any, dtype: Any) -> np.ndarray:
    try:
        array = np.array(data)
        if np.issubdtype(dtype, np.integer) and array.dtype.kind not in "iu":
            raise ValueError(f"{array.dtype} values")
        return array.astype(dtype)
    except (ValueError, TypeError) as e:
        raise ArgumentValueError(f"placement {name} is not an array of numbers: {e}", code="placement") from None


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
