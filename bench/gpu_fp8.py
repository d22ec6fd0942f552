"""How precisely this GPU's tensor cores add up FP8 products: our kernel and torch's own against exact sums.

Products of E4M3 codes are exact in float64. Errors are relative to the result: the norm's, and the largest to the
largest. Random normal operands, unit scales, groups of 128 (our kernel adds a group on the tensor core and the groups
in float32).
"""

from __future__ import annotations

import sys

import torch

from moec.backends.triton.kernels.fp8_linear import fp8_linear

ROWS, COLUMNS, GROUP = 128, 256, 128
E4M3 = torch.float8_e4m3fn


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured", file=sys.stderr)
        return 2
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: ‖error‖/‖result‖, largest error / largest result"
    )
    for k in (32, 64, 128, 512, 4096):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(ROWS, k, generator=generator).to(E4M3)
        w = torch.randn(COLUMNS, k, generator=generator).to(E4M3)
        exact = x.double() @ w.double().T
        groups = -(-k // GROUP)
        ones = torch.ones(ROWS, groups, device="cuda"), torch.ones(-(-COLUMNS // GROUP), groups, device="cuda")
        results = {"ours": fp8_linear(x.cuda(), ones[0], w.cuda(), ones[1], block=(GROUP, GROUP))}
        one = torch.ones((), device="cuda")
        for fast in (True, False):
            name = f"torch._scaled_mm, fast accumulation {'on' if fast else 'off'}"
            results[name] = torch._scaled_mm(
                x.cuda(), w.cuda().T, one, one, out_dtype=torch.float32, use_fast_accum=fast
            )
        for name, got in results.items():
            error = (got.double().cpu() - exact).abs()
            norm = float(error.norm() / exact.norm())
            print(f"K {k:5}: {name:42} {norm:.2e} {float(error.max() / exact.abs().max()):.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
