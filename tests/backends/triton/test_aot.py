"""Ahead-of-time compilation to sm_90: tensor-core instructions, no spills, shared memory within the limit."""

import dataclasses

import pytest
import torch

from moec.backends.triton import KERNELS, aot
from moec.backends.triton.aot_cases import production_cases
from moec.backends.triton.kernels.linear import linear
from moec.backends.triton.kernels.tiles import Tile

CASES = {case.name: case for case in production_cases()}

# The rest of the production cases are compiled by `aot.report()`; these reach every kernel and both operand orders.
TESTED = [
    "rms_norm",
    "quantize",
    "elementwise",
    "route deepseek-v3",
    "linear bf16 decode",
    "linear bf16 prefill",
    "fp8_linear decode",
    "fp8_linear prefill",
    "experts bf16 prefill",
    "fp8_experts decode",
    "fp8_experts prefill",
    "linear_attention gated delta rule",
    "linear_attention mamba",
    "attention gqa prefill",
    "attention mla decode",
]


@pytest.mark.parametrize("name", TESTED)
def test_kernel_compiles_well(name):
    reports = aot.report([CASES[name]])
    assert reports
    for report in reports:
        assert report.spills == 0, report
        assert report.shared_bytes <= aot.SHARED_LIMIT, report
        assert report.tensor_core == report.expected or report.expected is None, report
        assert 0 < report.registers <= 255, report
        assert report.ok
    named = {report.kernel.split(": ")[1] for report in reports}
    assert set(CASES[name].expect) <= named


def test_every_kernel_is_covered():
    wrappers = {name.split()[0] for name in TESTED}
    assert wrappers == set(KERNELS)


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_a_bad_tile_is_seen():
    """The checks can fail: 16 unswapped rows have no warp-group product, and a huge tile needs too much memory."""
    small = aot.launches_of(lambda: linear(meta(16, 512), meta(256, 512), tile=Tile(16, 64, 64)))
    report = aot.inspect_launch(small[0], expected="HGMMA")
    assert report.tensor_core == "HMMA"
    assert report.fits
    assert not report.ok
    assert not dataclasses.replace(report, shared_bytes=aot.SHARED_LIMIT + 1).fits
    assert not dataclasses.replace(report, instructions={"STL": 1}).fits


def test_signature_specialises_as_the_launcher_does():
    launch = aot.launches_of(lambda: linear(meta(1, 48), meta(50, 48)))[0]
    types, constants, attributes = aot.signature(launch)
    names = launch.kernel.arg_names
    assert types["x_ptr"] == "*bf16"
    assert types["N"] == "i32"
    assert types["K"] == "i32"
    assert types["M"] == "constexpr"
    assert constants["M"] == 1
    assert types["bias_ptr"] == "constexpr"
    assert constants["bias_ptr"] is None
    divisible = {names[index] for (index,) in attributes}
    assert "K" in divisible
    assert "N" not in divisible
    assert "w_ptr" in divisible
