"""Kernels on tensors of more than 2^31 elements, and grids within the limits of CUDA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.backends.triton import aot
from moec.backends.triton.kernels.attention import attention
from moec.backends.triton.kernels.dispatch import combine
from moec.backends.triton.kernels.elementwise import elementwise
from moec.backends.triton.kernels.fp8_linear import fp8_linear
from moec.backends.triton.kernels.linear import linear
from moec.backends.triton.kernels.quantize import quantize
from moec.backends.triton.kernels.rms_norm import rms_norm
from moec.backends.triton.kernels.route import route

PROBE = Path(__file__).with_name("offsets_probe.py")
CHECKS = re.findall(r"^def (check_\w+)", PROBE.read_text(), re.M)
BF16, F8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(scope="module")
def probe():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(PROBE), *CHECKS], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("check", CHECKS)
def test_far_elements_are_reached(probe, check):
    assert check in probe.stdout.split(), f"exit status {probe.returncode}: {probe.stderr[-2000:]}"


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def scales(*shape):
    return meta(*shape, dtype=torch.float32)


LARGE = {
    "attention decode": lambda: attention(
        meta(2**17, 16, 1, 128), meta(2**17, 8, 512, 128), meta(2**17, 8, 512, 128), scale=1.0
    ),
    "attention prefill": lambda: attention(
        meta(1, 2**17, 64, 64), meta(1, 2**17, 64, 64), meta(1, 2**17, 64, 64), scale=1.0
    ),
    "linear": lambda: linear(meta(2**24, 64), meta(2**20, 64)),
    "fp8_linear": lambda: fp8_linear(
        meta(2**24, 128, dtype=F8), scales(2**24, 1), meta(2**20, 128, dtype=F8), scales(2**13, 1)
    ),
    "rms_norm": lambda: rms_norm(meta(2**28, 64)),
    "quantize": lambda: quantize(meta(2**28, 256)),
    "route": lambda: route(meta(2**26, 64), k=8),
    "combine": lambda: combine(meta(2**27, 2**16), meta(2**26, 2, dtype=torch.int64), 64, BF16),
    "elementwise": lambda: elementwise("v0 = x0 + 1.0", (("v0", BF16),), (2**38,), meta(2**38)),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_grids_fit(name):
    """CUDA takes 2^31 − 1 programs along the first axis of a grid and 65535 along the others."""
    launches = aot.launches_of(LARGE[name])
    assert launches
    for launch in launches:
        assert launch.grid[0] < 2**31, launch.grid
        assert all(n <= 65535 for n in launch.grid[1:]), launch.grid
