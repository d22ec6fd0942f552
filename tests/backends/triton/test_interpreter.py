"""Triton's interpreter with our corrections, against torch and the definition of the formats."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = Path(__file__).with_name("interpreter_probe.py")
CHECKS = re.findall(r"^def (check_\w+)", PROBE.read_text(), re.M)


@pytest.fixture(scope="module")
def probe():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, str(PROBE)], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("check", CHECKS)
def test_interpreter(probe, check):
    assert check in probe.stdout.split(), probe.stderr
