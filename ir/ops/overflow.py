"""What ops that add up products leave open: sums beyond the range of f32 (for f64 operands, of f64).

Whether a part of a sum overflows depends on the order of additions, and what a norm or a softmax does with it on how
often it rounds; so results are promised for operands whose squares are far from the end of the range only.
"""

from __future__ import annotations

import torch


def overflows(*tensors: torch.Tensor | None) -> bool:
    """Whether a finite operand is so large (2⁶², for f64 2⁵¹⁰) that sums of its products may overflow."""
    for x in tensors:
        if x is None or not x.is_floating_point() or x.dtype.itemsize < 2 or not x.numel():
            continue
        limit = 2.0**510 if x.dtype == torch.float64 else 2.0**62
        size = x.to(torch.float64).abs()
        if bool(((size >= limit) & size.isfinite()).any()):
            return True
    return False
