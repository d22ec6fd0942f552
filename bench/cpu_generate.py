"""Tokens a second of `generate` on a cache of 512 tokens, against transformers' `generate`: `make bench-generate`.

python bench/cpu_generate.py [--model NAME ...] [--tokens N]

Both generate greedily from the same prompt by turns, once `N + 1` tokens and once one: the difference are N steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cpu_models import MODELS, ids
from cpu_pair import PAUSE
from cpu_peers import FOLDER, THREADS, environment
from rich.console import Console
from rich.table import Table

import moec

CACHE = 512
BLOCKS = 7
RESULT = FOLDER.parent / "bench-generate.json"
ASKED = {"transformers": 3.0, "int8": 1.6, "int4": 2.2}
Generate = Callable[[int], torch.Tensor]


def shipped() -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the shipped model, the same weights in transformers' DeepSeek-V3)"""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = moec.models.trained()
    c = ours.config
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        moe_intermediate_size=c.moe_intermediate_size, num_hidden_layers=c.num_layers,
        first_k_dense_replace=c.first_k_dense, num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads,
        n_shared_experts=c.num_shared_experts, n_routed_experts=c.num_experts, num_experts_per_tok=c.top_k,
        n_group=c.n_group, topk_group=c.topk_group, routed_scaling_factor=c.routed_scaling_factor,
        q_lora_rank=c.q_lora_rank, kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim, rope_interleave=c.rope_interleaved,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=2 * CACHE, num_mtp_layers=0,
    )).eval()  # fmt: skip
    weights = {k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()}
    missing, _ = theirs.load_state_dict(weights, strict=False)
    if missing:
        raise SystemExit(f"the shipped model has no {', '.join(missing)}")
    ours.config = dataclasses.replace(c, max_position=2 * CACHE)
    return ours, theirs


def both(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    if name == "shipped":
        return shipped()
    model = MODELS[name]()
    model.config.use_cache = True
    return model, model


def ours(compiled: moec.CompiledModel, prompt: torch.Tensor) -> Generate:
    return lambda count: compiled.generate(prompt, max_new_tokens=count, eos_token_id=None)


def theirs(model: Any, prompt: torch.Tensor) -> dict[str, Generate]:
    """transformers' `generate` with each of its implementations of experts."""

    def of(kind: str) -> Generate:
        def run(count: int) -> torch.Tensor:
            model.set_experts_implementation(kind)
            with torch.inference_mode():
                return model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                    eos_token_id=None, pad_token_id=0, use_cache=True,
                )  # fmt: skip

        return run

    # batched_mm copies the weights of each token: seconds for a prompt, whose variation would be all that is seen
    return {kind: of(kind) for kind in ("eager", "grouped_mm")}


def step(run: Generate, count: int) -> float:
    """Seconds of one step: `count` tokens more than the first."""
    time.sleep(PAUSE)
    times = []
    for n in (1, count + 1):
        start = time.perf_counter()
        run(n)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*MODELS, "shipped"]
    parser.add_argument("--model", nargs="*", default=names, choices=names)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    for name in args.model:
        mine, other = both(name)
        prompt = ids(1, CACHE) % mine.config.vocab_size
        compiled = {
            q or "f32": moec.compile(mine, backend="onnxruntime", threads=THREADS, quantize=q)
            for q in (None, "int8", "int4")
        }
        runs = {f"moec {q}": ours(c, prompt) for q, c in compiled.items()}
        peers = theirs(other, prompt)
        same = torch.equal(runs["moec f32"](args.tokens), peers["eager"](args.tokens))
        best = min(peers, key=lambda kind: min(step(peers[kind], args.tokens) for _ in range(2)))
        runs["transformers"] = peers[best]
        found: dict[str, list[float]] = {way: [] for way in runs}
        for run in runs.values():
            step(run, args.tokens)
        for _ in range(BLOCKS):
            for way, run in runs.items():
                found[way].append(step(run, args.tokens))
        own = found["moec f32"]
        for way, times in found.items():
            ratios = sorted(b / a if way == "transformers" else a / b for a, b in zip(own, times, strict=True))
            rows.append({
                "model": name, "way": way, "experts": best if way == "transformers" else None, "same": same,
                "tokens_per_s": 1 / statistics.median(times), "ratio": statistics.median(ratios),
                "lowest": ratios[0], "highest": ratios[-1],
            })  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"environment": environment(), "cache": CACHE, "rows": rows}, indent=1))
    table = Table("model", "way", "tokens/s", "ratio", title=f"one row, {CACHE} tokens in the cache, {THREADS} threads",
                  caption="transformers: its time over ours in f32 (3 asked); int8, int4: f32's over theirs (1.6, 2.2)",
                  title_justify="left")  # fmt: skip
    for r in rows:
        way = f"{r['way']} ({r['experts']})" if r["experts"] else r["way"]
        ratio = "" if r["way"] == "moec f32" else f"{r['ratio']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})"
        table.add_row(r["model"] + ("" if r["same"] else ", other text"), way, f"{r['tokens_per_s']:.0f}", ratio)
    console = Console(width=120)
    console.print(environment())
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
