"""Hostile running: batches, threads, errors and calls after them, killed workers, changed weights, wrong inputs."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError, Quantization, parse
from moec.ir.fp8 import codes_of
from moec.passes.quantize import QuantizeWeights

from .limits import limited
from .setups import SETUPS, compiled, no_worker_left, same

AUTO = torch.export.Dim.AUTO
BACKENDS = ("reference", "onnxruntime", "triton")
every_setup = pytest.mark.parametrize("setup", SETUPS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

LAYER = """
graph(%x: f32[T, 64]) -> (%y: f32[T, 64], %i: i64[T, 2]) {
  weight @norm: f32[64]
  weight @proj: f32[64, 64]
  weight @gate: f32[8, 64]
  weight @gate_up: f32[8, 64, 64]
  weight @down: f32[8, 64, 32]
  %0: f32[T, 64] = norm.rms(%x, @norm)
  %1: f32[T, 64] = linear.linear(%0, @proj, _)
  %2: f32[T, 8] = linear.linear(%1, @gate, _)
  %3: f32[T, 2], %4: i64[T, 2] = moe.route(%2, _) {k=2}
  %5: f32[T, 64] = moe.experts(%1, %3, %4, @gate_up, @down, _, _)
  return %5, %4
}
"""


def layer(seed: int = 0) -> moec.Graph:
    graph = parse(LAYER)
    r = torch.Generator().manual_seed(seed)
    graph.bind_weights({n: torch.randn(v.shape, generator=r) / v.shape[-1] ** 0.5 for n, v in graph.weights.items()})
    return graph


def rows(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))


@every_setup
@limited(seconds=60)
def test_a_token_is_the_same_in_any_batch(setup):
    """Codes, scales and experts of a token are equal to the bit alone, among others and in any order; its result is,
    but for the rounding of products of other shapes."""
    q = Quantization(block=(32, 32), group=32)
    graph = QuantizeWeights(q).run(layer())
    (quantize,) = graph.find("quant.quantize")
    x = rows(9)
    x[3] *= 1e4  # a batch-mate with another scale
    x[4] = 0.0
    x[5, 7] = torch.nan
    with no_worker_left():
        exe = compiled(setup, graph)
        legal = next(n for n in exe.graph.nodes if n.op == "quant.quantize")
        assert legal.attrs == quantize.attrs

        def observed(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, experts = exe.run([batch])
            tapped = exe.tap([batch], list(legal.results))
            codes, scales = (tapped[v] for v in legal.results)
            return codes_of(codes), scales.view(torch.int32), experts, y

        whole = observed(x)
        for order in ([8, 7, 6, 5, 4, 3, 2, 1, 0], [0], [3], [5], [0, 0, 0, 0], [4, 3], list(range(9)) * 20):
            part = observed(x[order])
            for got, want in zip(part[:3], whole[:3], strict=True):
                assert torch.equal(got, want[order]), order
            same(part[3], whole[3][order], 1e-5, f"{order}")


@every_backend
@limited(seconds=60)
def test_calls_from_many_threads(backend):
    """Eight threads with inputs of different sizes: each gets what it gets alone."""
    with no_worker_left():
        c = moec.compile(layer(), backend=backend, threads=1)
        inputs = [rows(1 + i % 5, seed=i) for i in range(24)]
        alone = [c(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda x: c(x), inputs))
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


class TinyLM(nn.Module):
    """A language model with a learned table of 12 positions and a KV cache."""

    def __init__(self, positions: int | None = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.place = nn.Embedding(12, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.head = nn.Linear(16, 32)
        self.config = type("Config", (), {"n_positions": positions})()

    def empty_cache(self, batch: int):
        return {name: torch.zeros(batch, 0, 16) for name in "kv"}

    def forward(self, input_ids, attention_mask, past):
        start, length = past["k"].shape[1], input_ids.shape[1]
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        x = self.embed(input_ids) + self.place(places)
        k, v = torch.cat((past["k"], self.k(x)), 1), torch.cat((past["v"], self.v(x)), 1)
        keys, new = torch.arange(k.shape[1]), torch.arange(length) + start
        allowed = (keys <= new[:, None])[None] & attention_mask[:, None].bool() | (keys == new[:, None])[None]
        scores = (self.q(x) @ k.transpose(1, 2)).masked_fill(~allowed, float("-inf"))
        return self.head(x + torch.softmax(scores, -1) @ v), {"k": k, "v": v}


@every_backend
@limited(seconds=60)
def test_generating_from_many_threads(backend):
    with no_worker_left():
        c = moec.compile(TinyLM().eval(), backend=backend, threads=1)
        prompts = [torch.tensor([[i, i + 1, i + 2][: 1 + i % 3]]) for i in range(8)]
        with ThreadPoolExecutor(4) as pool:  # the first calls compile the cached program
            together = list(pool.map(lambda p: c.generate(p, max_new_tokens=4), prompts))
        for prompt, got in zip(prompts, together, strict=True):
            assert torch.equal(got, c.generate(prompt, max_new_tokens=4))


@every_backend
@limited(seconds=60)
def test_the_last_position_and_one_more(backend, tmp_path):
    """All positions can be used; one more is refused before anything runs, also after saving and loading."""
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    with no_worker_left():
        c = moec.compile(TinyLM().eval(), backend=backend, threads=1)
        full = c.generate(prompt, max_new_tokens=8)
        assert full.shape == (1, 13)  # the last token takes no position
        c.save(tmp_path / "lm")
        for model in (c, moec.load(tmp_path / "lm")):
            assert torch.equal(model.generate(prompt, max_new_tokens=8), full)
            with pytest.raises(ArgumentValueError, match="take 13 positions, the model has 12") as caught:
                model.generate(prompt, max_new_tokens=9)
            assert "max_new_tokens can be 8 at most" in str(caught.value)
            # padding takes no positions
            padded = torch.cat((torch.zeros(1, 6, dtype=torch.int64), prompt), 1)
            mask = (torch.arange(11) >= 6).long()[None]
            assert torch.equal(model.generate(padded, mask, max_new_tokens=8)[:, 11:], full[:, 5:])
        # a model that does not say how many it has fails where it runs, with the op and its module
        silent = moec.compile(TinyLM(positions=None).eval(), backend=backend, threads=1)
        assert torch.equal(silent.generate(prompt, max_new_tokens=8), full)
        with pytest.raises(CompileError, match=r"tensor\.gather failed"):
            silent.generate(prompt, max_new_tokens=9)
        assert torch.equal(silent.generate(prompt, max_new_tokens=8), full)


@every_backend
@limited(seconds=60)
def test_ids_beyond_the_vocabulary(backend):
    with no_worker_left():
        c = moec.compile(TinyLM().eval(), backend=backend, threads=1)
        for bad in (32, 2**31, 2**62):
            with pytest.raises(ArgumentValueError, match=rf"holds the id {bad}, the model knows 0 … 31"):
                c.generate(torch.tensor([[1, bad]]), max_new_tokens=2)
        with pytest.raises(ArgumentValueError, match="holds the id -1"):
            c.generate(torch.tensor([[1, -1]]), max_new_tokens=2)
        assert c.generate(torch.tensor([[1, 31]]), max_new_tokens=2).shape == (1, 4)


@every_backend
@limited(seconds=60)
def test_wrong_cache_shapes(backend):
    """The cached program checks batch, width and length of every cache tensor against the mask."""
    with no_worker_left():
        program = moec.compile(TinyLM().eval(), backend=backend, threads=1).generator.program
        ids, mask = torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 5, dtype=torch.int64)
        good = [torch.zeros(2, 3, 16), torch.zeros(2, 3, 16)]
        want = program.executable.run([ids, mask, *good])
        for name, wrong in (
            ("batch", [torch.zeros(1, 3, 16), good[1]]),
            ("length", [torch.zeros(2, 4, 16), good[1]]),
            ("both lengths", [torch.zeros(2, 4, 16), torch.zeros(2, 4, 16)]),
            ("width", [torch.zeros(2, 3, 8), good[1]]),
            ("rank", [torch.zeros(2, 48), good[1]]),
        ):
            with pytest.raises(ArgumentValueError) as caught:
                program.executable.run([ids, mask, *wrong])
            assert "past" in str(caught.value) or "mask" in str(caught.value), (name, str(caught.value))
        with pytest.raises(ArgumentTypeError, match="expected 4 tensor inputs"):
            program.executable.run([ids, mask, good[0]])
        with pytest.raises(ArgumentTypeError, match="f64, expected f32"):
            program.executable.run([ids, mask, good[0].double(), good[1]])
        again = program.executable.run([ids, mask, *good])
        assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@every_backend
@limited(seconds=60)
def test_calls_after_errors(backend):
    """Refused calls, and calls that fail inside, change nothing for the next."""
    with no_worker_left():
        c = moec.compile(layer(), backend=backend, threads=1)
        x = rows(3)
        want = c(x)[0]
        wrong: list[tuple[tuple[Any, ...], type[CompileError], str]] = [
            ((), ArgumentTypeError, "missing arguments: x"),
            ((x, x), ArgumentTypeError, "expected 1 positional"),
            ((x.double(),), ArgumentTypeError, "'x' has dtype f64, expected f32"),
            ((x.half(),), ArgumentTypeError, "'x' has dtype f16, expected f32"),
            ((x.long(),), ArgumentTypeError, "'x' has dtype i64, expected f32"),
            ((x[:, :63],), ArgumentValueError, "x"),
            ((x[0],), ArgumentValueError, "x"),
            ((torch.tensor(1.0),), ArgumentValueError, "x"),
            ((x.numpy(),), ArgumentTypeError, "'x' must be a torch.Tensor"),
            ((None,), ArgumentTypeError, "x"),
            ((x.to("meta"),), ArgumentTypeError, "'x' is on meta"),
            ((x.to_sparse(),), ArgumentTypeError, "'x' is sparse"),
            ((torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),), ArgumentTypeError, "'x'"),
            ((torch.nested.nested_tensor([x[0], x[1]]),), ArgumentTypeError, "'x' is nested"),
            ((torch.zeros(3, 64, dtype=torch.complex64),), ArgumentTypeError, "'x' has dtype"),
        ]
        for args, kind, said in wrong:
            with pytest.raises(CompileError, match=said) as caught:
                c(*args)
            assert isinstance(caught.value, kind), (said, type(caught.value))
            assert torch.equal(c(x)[0], want)


class Marked(torch.Tensor):
    """A subclass that adds nothing."""


@every_backend
@limited(seconds=60)
def test_inputs_of_every_kind(backend):
    """Views, gradients, subclasses and inference tensors are read as they are, and not written to."""
    with no_worker_left():
        c = moec.compile(layer(), backend=backend, threads=1)
        x = rows(4)
        want = c(x)[0]
        whole = torch.full((4, 200), torch.nan)
        whole[:, 50:114] = x
        with torch.inference_mode():
            inference = x.clone()
        for name, given in {
            "transposed": x.T.contiguous().T,
            "a slice": whole[:, 50:114],
            "every other": torch.stack([x, x * torch.nan], -1)[..., 0],
            "flipped strides": x.flip(0).flip(0),
            "expanded": x[:1].expand(4, 64),
            "requires grad": x.clone().requires_grad_(),
            "a parameter": nn.Parameter(x.clone()),
            "a subclass": x.clone().as_subclass(Marked),
            "inference": inference,
            "conjugated": torch.complex(x, x).conj().real,
            "negated": torch.complex(x, -x).conj().imag,
        }.items():
            before = given.detach().clone()
            (got, _) = c(given)
            assert type(got) is torch.Tensor, name
            assert not got.requires_grad, name
            same(got, want[:1].expand(4, 64) if name == "expanded" else want, 1e-6, name)
            assert torch.equal(given.detach(), before), name
        with torch.enable_grad():
            assert not c(x.requires_grad_())[0].requires_grad


@limited(seconds=60)
def test_a_worker_killed_while_it_runs():
    """The interpreter worker dies in the middle of a call: one error, and the next call starts another."""
    from moec.backends.triton import worker

    with no_worker_left():
        c = moec.compile(layer(), backend="triton")
        x = rows(3)
        want = c(x)[0]
        for wait in (0.0, 0.01):
            pid = worker().pid
            assert pid is not None
            big = rows(400)
            threading.Timer(wait, os.kill, (pid, signal.SIGKILL)).start()
            with pytest.raises(CompileError, match="failed on triton: the Triton interpreter worker died"):
                call_often(c, big)
            assert torch.equal(c(x)[0], want)
            assert worker().pid not in (None, pid)


def call_often(c: moec.CompiledModel, x: torch.Tensor) -> None:
    for _ in range(50):
        c(x)


@every_backend
@limited(seconds=60)
def test_a_call_within_a_call(backend):
    """A signal handler calls the model while a call of it runs: both compute, or (where one worker serves both) the
    inner one is refused; the next call is as good as the first."""
    with no_worker_left():
        c = moec.compile(layer(), backend=backend, threads=1)
        x, inner = rows(300), rows(2, seed=5)
        want, want_inner = c(x)[0], c(inner)[0]
        seen: list[Any] = []

        def handler(*_: Any) -> None:
            try:
                seen.append(c(inner)[0])
            except CompileError as e:
                seen.append(e)

        signal.signal(signal.SIGALRM, handler)
        for wait in (0.0005, 0.002, 0.01, 0.05):
            signal.setitimer(signal.ITIMER_REAL, wait)
            for _ in range(200):
                assert torch.equal(c(x)[0], want)
                if seen:
                    break
            (got,) = seen
            seen.clear()
            if isinstance(got, CompileError):
                assert backend == "triton"
                assert "was called while this thread waited for its answer" in str(got)
            else:
                assert torch.equal(got, want_inner)
            assert torch.equal(c(inner)[0], want_inner)


@every_backend
@limited(seconds=60)
def test_weights_that_change_after_compilation(backend):
    """Before the first reading they may change; then a backend computes on what it read, or says that they changed:
    never on a mixture."""
    with no_worker_left():
        for quantize in (None, "fp8"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False)).eval()
            x = rows(3)
            graph = moec.trace(model, (x,))
            with torch.no_grad():
                model[0].weight.mul_(0.5)  # traced, but not read yet
            c = moec.compile(graph, backend=backend, quantize=quantize, threads=1)
            want = moec.compile(model, (x,), backend=backend, quantize=quantize, threads=1)(x)
            (first,) = c(x)
            assert torch.equal(first, want)
            with torch.no_grad():
                model[2].weight.mul_(2.0)
            changed = None
            try:
                (second,) = c(x)
            except CompileError as e:
                changed = str(e)
            if changed is None:
                assert torch.equal(second, first)
            else:
                assert "weight '2.weight' was modified in place after it had been read" in changed
            fresh = moec.compile(model, (x,), backend=backend, quantize=quantize, threads=1)(x)
            same(fresh, first * 2, 1e-5)
