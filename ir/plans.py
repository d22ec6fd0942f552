"""Plans that several parts share: how to quantise, which machines there are, where experts live."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Placement:
    """Which logical expert each physical slot holds.

    `physical_to_logical`: per MoE layer a row of expert ids, slots in GPU order. `balance`: max/mean load
    per GPU and layer under the load it was made for; `lower_bound`: what no placement can beat (both
    floats per layer). `moves`: slots per layer whose expert changed against the current placement.
    """

    mesh: Mesh
    physical_to_logical: tuple[tuple[int, ...], ...]
    balance: tuple[float, ...] = ()
    lower_bound: tuple[float, ...] = ()
    moves: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows = tuple(tuple(int(e) for e in row) for row in self.physical_to_logical)
        object.__setattr__(self, "physical_to_logical", rows)
        for layer, row in enumerate(rows):
            if len(row) != self.mesh.num_slots:
                raise ArgumentValueError(
                    f"placement layer {layer} has {len(row)} slots, the mesh has {self.mesh.num_slots}",
                    code="placement",
                )
            missing = sorted(set(range(max(row) + 1)) - set(row))
            if min(row) < 0 or missing:
                raise ArgumentValueError(
                    f"placement layer {layer}: experts {missing or [min(row)]} have no slot", code="placement"
                )

    @property
    def num_layers(self) -> int:
        return len(self.physical_to_logical)
