"""Argument checks shared by the kernel wrappers: every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
GROUP = 128
"""Elements of a row that share an activation scale, and the side of a weight block."""


def describe(tensor: torch.Tensor) -> str:
    """`float32[2, 3]`, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_float(name: str, tensor: torch.Tensor) -> None:
    """`tensor` must be float32, bfloat16 or float16."""
    require(tensor.dtype in FLOATS, f"{name} must be float32, bfloat16 or float16, got {describe(tensor)}")


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """`tensor` must have exactly this shape."""
    require(tuple(tensor.shape) == shape, f"{name} must have shape {list(shape)}, got {describe(tensor)}")


def require_codes(name: str, codes: torch.Tensor, scales: torch.Tensor, scale_shape: tuple[int, ...]) -> None:
    """`codes` must be E4M3 and `scales` float32 of `scale_shape`."""
    require(codes.dtype == E4M3, f"{name} must be float8_e4m3fn, got {describe(codes)}")
    require(scales.dtype == torch.float32, f"the scales of {name} must be float32, got {describe(scales)}")
    require_shape(f"the scales of {name}", scales, scale_shape)


def require_group(group: int) -> None:
    """A scale group must be a power of two up to 128."""
    require(0 < group <= GROUP and group & (group - 1) == 0, f"group must be a power of two up to {GROUP}, got {group}")


def require_same_device(**tensors: torch.Tensor | None) -> None:
    """All tensors given must live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "all tensors must be on one device, got " + ", ".join(f"{n} on {d}" for n, d in devices.items())
        )


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as a contiguous matrix [rows, last dimension]."""
    return tensor.contiguous().view(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(-1, tensor.shape[-1])
