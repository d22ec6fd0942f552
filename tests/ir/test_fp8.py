"""The FP8 oracle against ml_dtypes: every code, every midpoint, overflow, NaN, zeros, subnormals, in every float."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from moec.ir.fp8 import E4M3FN, E5M2, Float8

PEERS = {"E4M3FN": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
ALL = torch.arange(256, dtype=torch.uint8)

formats = pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda f: f.name)


def peer(fmt: Float8, x: np.ndarray) -> torch.Tensor:
    """ml_dtypes' codes; its one NaN code per sign as the oracle's."""
    with np.errstate(all="ignore"):
        codes = torch.from_numpy(x.astype(PEERS[fmt.name]).view(np.uint8).copy())
    nan = fmt.decode(codes).isnan()
    return torch.where(nan, (codes & 0x80) | fmt.nan_code, codes)


@formats
def test_numbers_of_the_format(fmt: Float8):
    info = ml_dtypes.finfo(PEERS[fmt.name])
    assert fmt.largest == float(info.max)
    assert fmt.smallest == float(info.smallest_subnormal)
    assert fmt.bias == {"E4M3FN": 7, "E5M2": 15}[fmt.name]
    assert fmt.overflow == {"E4M3FN": 464.0, "E5M2": 61440.0}[fmt.name]


@formats
def test_every_code_is_decoded(fmt: Float8):
    want = ALL.numpy().view(PEERS[fmt.name]).astype(np.float64)
    got = fmt.decode(ALL).numpy()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
    assert int(np.isnan(got).sum()) == {"E4M3FN": 2, "E5M2": 6}[fmt.name]


@formats
@pytest.mark.parametrize("saturate", [False, True])
def test_every_code_comes_back(fmt: Float8, saturate: bool):
    value = fmt.decode(ALL)
    got = fmt.encode(value, saturate=saturate)
    want = torch.where(value.isnan(), (ALL & 0x80) | fmt.nan_code, ALL)
    if saturate:
        want = torch.where(value.isinf(), (ALL & 0x80) | fmt.largest_code, want)
    assert torch.equal(got, want)


@formats
@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_every_number_between_codes_is_rounded_as_ml_dtypes_does(fmt: Float8, dtype: torch.dtype):
    """All 16-bit floats, or every code, midpoint, their neighbours in f32, overflow, subnormals and NaN payloads."""
    if dtype == torch.float32:
        bits = near_codes(fmt).view(torch.int32)
        bits = torch.cat([bits, torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 1, 0x007FFFFF], dtype=torch.int32)])
        x = torch.cat([bits, bits ^ -(2**31)]).view(torch.float32)
        as_numpy = x.numpy()
    else:
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        x, as_numpy = every.view(dtype), every.numpy().view(NUMPY[dtype])
    assert torch.equal(fmt.encode(x, saturate=False), peer(fmt, as_numpy))


def near_codes(fmt: Float8) -> torch.Tensor:
    """Codes, midpoints, the threshold of overflow and the f32 numbers just below and above each."""
    value = fmt.decode(torch.arange(fmt.largest_code + 1, dtype=torch.uint8))
    points = torch.cat([value, (value[1:] + value[:-1]) / 2, torch.tensor([fmt.overflow, 2 * fmt.largest, 1e30])])
    points = points.to(torch.float32)
    up, down = (torch.nextafter(points, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    return torch.cat([points, up, down, torch.tensor([torch.inf])])


@formats
def test_midpoints_go_to_the_even_code_and_their_neighbours_do_not(fmt: Float8):
    """Stated without a peer, and in float64, where one step is far smaller than any that ml_dtypes sees."""
    codes = torch.arange(fmt.largest_code, dtype=torch.uint8)
    middle = (fmt.decode(codes) + fmt.decode(codes + 1)) / 2
    even = torch.where(codes % 2 == 0, codes, codes + 1)
    for sign, bit in ((1.0, 0), (-1.0, 0x80)):
        assert torch.equal(fmt.encode(sign * middle, saturate=False), even | bit)
        below = torch.nextafter(middle, torch.zeros_like(middle))
        above = torch.nextafter(middle, torch.full_like(middle, torch.inf))
        assert torch.equal(fmt.encode(sign * below, saturate=False), codes | bit)
        assert torch.equal(fmt.encode(sign * above, saturate=False), (codes + 1) | bit)


@formats
def test_overflow(fmt: Float8):
    limit = torch.tensor(fmt.overflow, dtype=torch.float64)
    below = torch.nextafter(limit, torch.zeros_like(limit))
    past = {"E4M3FN": 0x7F, "E5M2": 0x7C}[fmt.name]
    # 464 lies between 448 (even) and 480, which is NaN; 61440 between 57344 (odd) and 65536, which is infinite
    at_limit = {"E4M3FN": 0x7E, "E5M2": 0x7C}[fmt.name]
    x = torch.stack([below, limit, limit * 2, torch.tensor(torch.inf, dtype=torch.float64)])
    assert fmt.encode(x, saturate=False).tolist() == [fmt.largest_code, at_limit, past, past]
    assert fmt.encode(-x, saturate=True).tolist() == [fmt.largest_code | 0x80] * 4
