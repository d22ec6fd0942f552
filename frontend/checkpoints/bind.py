"""From the tensors of a checkpoint to the weights of our model: by name, checked, and read only when needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.quantization import BlockFP8
from moec.ir import DType, TensorType, Weight
from moec.ir.weight import BlockScaledSource, StackedSource

Shape = tuple[int, ...]

# the router computes in f32 at least, whatever it is stored in
KEPT = re.compile(r".*\.mlp\.gate\.(weight|e_score_correction_bias)")
_EXPERTS = re.compile(r"(.*\.mlp)\.experts\.(gate_up_proj|down_proj)")
# what checkpoints hold besides: tables that follow from the config, and copies of the embedding and the head
_REDUNDANT = re.compile(r".*\.rotary_emb\.inv_freq|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


class Tensor(Protocol):
    """A tensor of a checkpoint, as `shards.Stored`."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    def load(self) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class _Converted:
    """A stored tensor in another float dtype."""

    stored: Tensor
    dtype: DType

    def load(self) -> torch.Tensor:
        return self.stored.load().to(self.dtype.torch)


@dataclass(frozen=True)
class _Piece:
    """One matrix of a checkpoint, with its scales where it is stored in FP8."""

    data: Tensor
    scale: Tensor | None

    def scales(self, repeat: int, rows: int) -> torch.Tensor:
        """f32 scales, each row of them `repeat` times, `rows` in all."""
        assert self.scale is not None
        scale = self.scale.load().to(torch.float32)
        return scale if repeat == 1 else scale.repeat_interleave(repeat, dim=0)[:rows]


class Binder:
    """Finds, checks and describes the weights of a model. Complaints go to `problems`.

    `dtype` is what the model computes in: weights stored in another wide float become it when they are read.
    `quantization` says how FP8 weights are scaled, None that there are none.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: DType, quantization: BlockFP8 | None, problems: Problems):
        self.tensors, self.dtype, self.quantization, self.problems = tensors, dtype, quantization, problems
        self.used: set[str] = set()
        self.scaled: list[Tensor] = []

    def bind(self, expected: Mapping[str, Shape], stored_as: Callable[[str], str]) -> dict[str, Weight]:
        """A weight for each parameter (name and shape) of the model; `stored_as` gives what a parameter, or one of
        `…experts.<number>.<gate_proj, up_proj, down_proj>.weight`, is called in the checkpoint."""
        weights: dict[str, Weight] = {}
        for name, shape in expected.items():
            experts = _EXPERTS.fullmatch(name)
            if experts is not None and name not in self.tensors:
                weight = self._experts(name, shape, experts[1], experts[2], stored_as)
            else:
                weight = self._plain(name, shape, name if name in self.tensors else stored_as(name))
            if weight is not None:
                weights[name] = weight
        self._check_rest(expected)
        self._check_scales()
        return weights

    def _plain(self, name: str, shape: Shape, stored_name: str) -> Weight | None:
        piece = self._piece(stored_name, shape)
        if piece is None:
            return None
        stored = DType(piece.data.dtype)
        if piece.scale is not None:
            return self._codes(name, shape, piece)
        dtype = stored if KEPT.fullmatch(name) else self.dtype
        source: Any = piece.data if stored is dtype else _Converted(piece.data, dtype)
        return Weight(name, TensorType(dtype, shape), source)

    def _codes(self, name: str, shape: Shape, piece: _Piece) -> Weight:
        assert self.quantization is not None
        assert piece.scale is not None
        block = self.quantization.block
        codes = Weight(piece.data.name, TensorType(DType.F8E4M3, shape), piece.data)
        scale_type = TensorType(DType.F32, _blocks(shape, block))
        scale: Any = piece.scale if piece.scale.dtype == "f32" else _Converted(piece.scale, DType.F32)
        scales = Weight(piece.scale.name, scale_type, scale)
        stored = BlockScaledSource(codes, scales, block, self.dtype.torch)
        return Weight(name, TensorType(self.dtype, shape), stored)

    def _experts(self, name: str, shape: Shape, mlp: str, which: str, stored_as: Callable[[str], str]) -> Weight | None:
        """[E, R, C] out of E matrices, or of E gates [f, C] and E ups [f, C]."""
        num, rows, columns = shape
        matrices = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
        each = rows // len(matrices)
        found = [
            [self._piece(stored_as(f"{mlp}.experts.{e}.{m}.weight"), (each, columns)) for m in matrices]
            for e in range(num)
        ]
        pieces = [[p for p in expert if p is not None] for expert in found]
        if any(len(p) < len(matrices) for p in pieces):
            return None
        in_fp8 = {p.scale is not None for expert in pieces for p in expert}
        if len(in_fp8) == 2:
            self.problems.add(f"{mlp}.experts: some of the {num} experts are stored in FP8, others are not")
            return None
        if in_fp8 == {True}:
            return self._expert_codes(name, shape, pieces, each)
        dtype = self.dtype.torch
        stack = StackedSource(shape, dtype, [_joined(p, dtype) for p in pieces])
        return Weight(name, TensorType(self.dtype, shape), stack)

    def _expert_codes(self, name: str, shape: Shape, pieces: list[list[_Piece]], each: int) -> Weight:
        assert self.quantization is not None
        height, width = self.quantization.block
        gate = each if len(pieces[0]) > 1 else shape[2]
        if gate % height:
            # up's first block would begin within gate's last: lower blocks fit both, their scales are repeated
            height = math.gcd(height, gate)
        repeat = self.quantization.block[0] // height
        rows, scales = -(-each // height), _blocks(shape, (height, width))
        code = torch.float8_e4m3fn
        codes = StackedSource(shape, code, [_joined(p, code) for p in pieces])
        scale = StackedSource(scales, torch.float32, [_joined_scales(p, repeat, rows) for p in pieces])
        stored = BlockScaledSource(
            Weight(f"{name}.weight", TensorType(DType.F8E4M3, shape), codes),
            Weight(f"{name}.weight_scale_inv", TensorType(DType.F32, scales), scale),
            (height, width),
            self.dtype.torch,
        )
        return Weight(name, TensorType(self.dtype, shape), stored)

    def _piece(self, name: str, shape: Shape) -> _Piece | None:
        """A tensor of the checkpoint that has to be there, or None after a complaint."""
        data = self.tensors.get(name)
        self.used |= {name, f"{name}_scale_inv"}
        if data is None:
            self.problems.add(f"{name} {list(shape)} is missing")
            return None
        ok = data.shape == shape
        if not ok:
            self.problems.add(f"{name} has the shape {list(data.shape)}, the config wants {list(shape)}")
        scale = self.tensors.get(f"{name}_scale_inv")
        if data.dtype in ("f64", "f32", "f16", "bf16"):
            if scale is not None:
                self.problems.add(f"{scale.name} is there, but {name} is stored in {data.dtype}, not in FP8")
            return _Piece(data, None) if ok else None
        if data.dtype != "f8e4m3fn":
            self.problems.add(f"{name} is stored in {data.dtype}, expected f32, f16, bf16 or f8e4m3fn")
            return None
        if self.quantization is None:
            self.problems.add(f"{name} is stored in f8e4m3fn, but config.json has no quantization_config")
            return None
        if len(shape) != 2:
            self.problems.add(f"{name} {list(shape)} is stored in f8e4m3fn, which is supported for matrices only")
            return None
        return self._scaled(name, data, scale) if ok else None

    def _scaled(self, name: str, data: Tensor, scale: Tensor | None) -> _Piece | None:
        assert self.quantization is not None
        wanted = _blocks(data.shape, self.quantization.block)
        if scale is None:
            self.problems.add(f"{name}_scale_inv {list(wanted)} is missing, {name} is stored in FP8")
            return None
        ok = scale.shape == wanted
        if not ok:
            self.problems.add(
                f"{scale.name} has the shape {list(scale.shape)}, {name} {list(data.shape)} in blocks of "
                f"{list(self.quantization.block)} wants {list(wanted)}"
            )
        if scale.dtype not in ("f32", "bf16", "f8e8m0fnu"):
            self.problems.add(f"{scale.name} is stored in {scale.dtype}, expected f32, bf16 or f8e8m0fnu")
            return None
        if ok:
            self.scaled.append(scale)
        return _Piece(data, scale) if ok else None

    def _check_rest(self, expected: Iterable[str]) -> None:
        allowed = {"lm_head.weight", "output.weight"} if "lm_head.weight" not in expected else set()
        for name in sorted(self.tensors.keys() - self.used - allowed):
            if not _REDUNDANT.fullmatch(name):
                t = self.tensors[name]
                self.problems.add(f"{name} {t.dtype}{list(t.shape)} is not part of this model")

    def _check_scales(self) -> None:
        """Scales are read once here: they are 1/4096 of what they scale."""
        for stored in self.scaled:
            scale = stored.load().to(torch.float32)
            bad = ~((scale > 0) & scale.isfinite())
            if bool(bad.any()):
                row, column = (int(i) for i in bad.nonzero()[0])
                self.problems.add(
                    f"{stored.name} has {int(bad.sum())} scales that are no positive finite numbers, the first is "
                    f"{float(scale[row, column])} in block [{row}, {column}]"
                )


def _blocks(shape: Shape, block: tuple[int, int]) -> Shape:
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


def _joined(pieces: list[_Piece], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """The rows of the pieces as one matrix."""

    def read() -> torch.Tensor:
        parts = [p.data.load().to(dtype) for p in pieces]
        if len(parts) == 1:
            return parts[0]
        if dtype != torch.float8_e4m3fn:
            return torch.cat(parts)
        return torch.cat([p.view(torch.uint8) for p in parts]).view(dtype)

    return read


def _joined_scales(pieces: list[_Piece], repeat: int, rows: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([p.scales(repeat, rows) for p in pieces])
