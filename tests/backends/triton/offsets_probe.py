"""Run by test_offsets.py in a process with TRITON_INTERPRET=1: kernels on tensors of more than 2^31 elements.

Only the last program of each grid runs, and only the memory that it touches becomes real: the rest of a tensor is
address space. Prints one line for each check that holds.
"""

import math
import resource
import sys

import torch
from triton.runtime import interpreter

from moec.backends.triton.kernels.attention import attention
from moec.backends.triton.kernels.dispatch import combine
from moec.backends.triton.kernels.elementwise import elementwise
from moec.backends.triton.kernels.experts import experts
from moec.backends.triton.kernels.fp8_experts import fp8_experts
from moec.backends.triton.kernels.fp8_linear import fp8_linear
from moec.backends.triton.kernels.linear import linear
from moec.backends.triton.kernels.quantize import quantize
from moec.backends.triton.kernels.rms_norm import rms_norm
from moec.backends.triton.kernels.route import route
from moec.ir.fp8 import codes_of, quantize_exactly

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
MEMORY = 2 << 30

run_grid = interpreter.GridExecutor.__call__
set_index = interpreter.interpreter_builder.set_grid_idx
last_only = True


def last_program(self, *args, **kwargs):
    last = [n - 1 for n in self.grid] + [0] * (3 - len(self.grid))
    if last_only:
        self.grid = (1,) * len(self.grid)
        interpreter.interpreter_builder.set_grid_idx = lambda x, y, z: setattr(
            interpreter.interpreter_builder, "grid_idx", tuple(last)
        )
    try:
        run_grid(self, *args, **kwargs)
    finally:
        interpreter.interpreter_builder.set_grid_idx = set_index


interpreter.GridExecutor.__call__ = last_program
# it would copy every tensor onto itself, which makes all of it real
interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def large(*shape, dtype=BF16, tail=4):
    """Address space for a tensor of more than 2^31 elements, its last `tail` rows random."""
    assert math.prod(shape) > 2**31, shape
    x = torch.empty(shape, dtype=dtype)
    x[-tail:] = torch.randn(tail, *shape[1:]).to(dtype)
    return x


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-2, atol=1e-2)
    assert want.double().abs().max() > 0.01


def check_quantize():
    x = large(2**19 + 3, 4096)
    codes, scales = quantize(x)
    want_codes, want_scales = quantize_exactly(x[-2:, -256:], (1, 128))
    assert torch.equal(codes_of(codes[-2:, -256:]), want_codes)
    assert torch.equal(scales[-2:, -2:], want_scales)


def check_rms_norm():
    x, residual = large(2**20 + 3, 2048), large(2**20 + 3, 2048)
    y, total = rms_norm(x, residual=residual)
    close(total[-2:], x[-2:] + residual[-2:])
    close(y[-2:], torch.nn.functional.rms_norm(total[-2:].float(), (2048,), eps=1e-6))


def check_linear():
    x, w = large(2**21 + 5, 1024), torch.randn(32, 1024).to(BF16) / 32
    close(linear(x, w)[-4:], x[-4:].float() @ w.float().T)
    x, w = torch.randn(3, 1024).to(BF16) / 32, large(2**21 + 5, 1024)
    close(linear(x, w)[:, -4:], x.float() @ w[-4:].float().T)
    x, w = torch.zeros(2**16 + 4, 16, dtype=BF16), torch.zeros(2**15 + 4, 16, dtype=BF16)
    x[-4:], w[-4:] = torch.randn(4, 16), torch.randn(4, 16)
    close(linear(x, w)[-4:, -4:], x[-4:].float() @ w[-4:].float().T)


def check_fp8_linear():
    x, w = large(2**21 + 5, 1024, dtype=F8), torch.randn(32, 1024).to(F8)
    xs, ws = torch.full((2**21 + 5, 8), 0.25), torch.full((1, 8), 0.5)
    close(fp8_linear(x, xs, w, ws)[-4:], x[-4:].float() @ w.float().T / 8)
    x, w = torch.randn(3, 1024).to(F8), large(2**21 + 5, 1024, dtype=F8)
    xs, ws = torch.full((3, 8), 0.25), torch.full((2**14 + 1, 8), 0.5)
    close(fp8_linear(x, xs, w, ws)[:, -4:], x.float() @ w[-4:].float().T / 8)


def swiglu(x, gate_up, down):
    gate, up = (x.float() @ gate_up.float().T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.float().T


def check_experts():
    """All of a few tokens' tiles run; their expert is the last."""
    global last_only
    last_only = False
    e, d, f = 2**11 + 1, 1024, 512
    x, weights, ids = torch.randn(3, d).to(BF16), torch.ones(3, 1), torch.full((3, 1), e - 1)
    gate_up, down = large(e, 2 * f, d, tail=1), large(2 * e, d, f, tail=1)[e:]
    gate_up[-1] /= 32
    down[-1] /= 32
    close(experts(x, weights, ids, gate_up, down), swiglu(x, gate_up[-1], down[-1]))
    codes = large(e, 2 * f, d, dtype=F8, tail=1), large(2 * e, d, f, dtype=F8, tail=1)[e:]
    scales = torch.full((e, 8, 8), 1 / 32), torch.full((e, 8, 4), 1 / 32)
    y = fp8_experts(x, weights, ids, codes[0], scales[0], codes[1], scales[1], group=None)
    close(y, swiglu(x, codes[0][-1].float() / 32, codes[1][-1].float() / 32))
    last_only = True


def check_combine():
    y, ids = large(2**21 + 4, 1024), torch.zeros(2**20 + 2, 2, dtype=torch.int64)
    close(combine(y, ids, 1, BF16)[-2:], y[-4:].float().reshape(2, 2, 1024).sum(1))


def check_route():
    logits = large(2**23 + 3, 256)
    weights, chosen = route(logits, k=2)
    want = logits[-2:].float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    picked = want.values[:, :2] / want.values[:, :2].sum(-1, keepdim=True)
    close(weights[-2:], picked)
    assert logits[-2:].gather(1, chosen[-2:]).tolist() == logits[-2:].sort(-1, descending=True).values[:, :2].tolist()


def check_attention():
    shape = 2**14 + 1, 2, 1024, 64
    q, (k, v) = torch.zeros(shape[0], 2, 1, 64, dtype=BF16), (large(*shape, tail=1) for _ in "kv")
    q[-1] = torch.randn(2, 1, 64)
    mask = torch.zeros(shape[0], 1, 1, 1024, dtype=torch.bool)
    mask[-1, ..., 100:] = True
    got = attention(q, k, v, mask, scale=0.125)[-1]
    scores = (q[-1].float() @ k[-1].float().mT * 0.125).masked_fill(~mask[-1], -torch.inf)
    close(got[-1], (scores.softmax(-1) @ v[-1].float())[-1])


def check_elementwise():
    x, row = large(2**21 + 1, 1024), torch.randn(1024).to(BF16)
    (y,) = elementwise("v0 = x0 * x1 + 1.0", (("v0", BF16),), tuple(x.shape), x, row)
    close(y[-1, -16:], x[-1, -16:].float() * row[-16:].float() + 1)
    columns = large(2**21 + 1, 1024)
    (y,) = elementwise("v0 = x0 + 1.0", (("v0", BF16),), (1024, 2**21 + 1), columns.T)
    close(y[-1, -3:], columns[-3:, -1].float() + 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        globals()[name]()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        assert used < MEMORY, f"{name} used {used >> 20} MiB"
        print(name, flush=True)
