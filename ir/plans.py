"""Plans that several parts share: how to quantise, which machines there are, where experts live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.ir.errors import ArgumentValueError


@dataclass(frozen=True)
class Quantization:
    """What to store in fewer bits.

    `weights`: "f8e4m3fn". `activations`: "f8e4m3fn" (per token, groups of `group` channels) or None for
    weight-only. `block`: rows × columns of a weight block that share one f32 scale (DeepSeek-V3 report,
    §3.3: 128×128, activations 1×128). `keep`: dotted module paths (prefix match) left as they are.
    `min_coverage`: least share of linear and expert weight bytes that must end up quantised.
    """

    weights: str = "f8e4m3fn"
    activations: str | None = "f8e4m3fn"
    block: tuple[int, int] = (128, 128)
    group: int = 128
    keep: tuple[str, ...] = ("lm_head",)
    min_coverage: float = 0.5

    def __post_init__(self) -> None:
        if self.weights != "f8e4m3fn" or self.activations not in (None, "f8e4m3fn"):
            raise ArgumentValueError(
                f"Quantization(weights={self.weights!r}, activations={self.activations!r}) is not supported",
                code="quantize",
                hint="weights 'f8e4m3fn', activations 'f8e4m3fn' or None",
            )
        if min(*self.block, self.group) < 1:
            raise ArgumentValueError(f"block {self.block} and group {self.group} must be positive", code="quantize")

    @staticmethod
    def of(spec: Quantization | str | None) -> Quantization | None:
        """From the `quantize=` argument. Raises ArgumentValueError on an unknown name."""
        if spec is None or isinstance(spec, Quantization):
            return spec
        if spec == "fp8":
            return Quantization()
        if spec == "fp8-weight-only":
            return Quantization(activations=None)
        raise ArgumentValueError(
            f"unknown quantize={spec!r}", code="quantize", hint="None, 'fp8', 'fp8-weight-only' or moec.Quantization"
        )


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
