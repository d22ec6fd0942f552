"""AbsorbMLA and MergeLinears against the default pipeline: cached steps and prompts on ONNX Runtime, one thread.

    make bench-attention

All variants of a case run in turn in one process; the least time of `--runs` counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

import moec
import moec.models
from moec.decoder import cached_decoder, example
from moec.frontend import trace
from moec.passes import AbsorbMLA, MergeLinears, default_pipeline

CONFIGS = {
    "GQA, width 1024": dataclasses.replace(
        moec.models.config("mixtral-8x7b-mini"),
        hidden_size=1024, num_layers=2, num_heads=16, num_kv_heads=4, head_dim=64, moe_intermediate_size=256,
        vocab_size=32,
    ),
    "MLA, width 1024, latents of 256": dataclasses.replace(
        moec.models.config("deepseek-v3-mini"),
        hidden_size=1024, num_layers=2, first_k_dense=1, intermediate_size=1024, num_heads=16, q_lora_rank=384,
        kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, moe_intermediate_size=128,
        vocab_size=32, max_position=2048,
    ),
}  # fmt: skip
VARIANTS = {
    "default": (),
    "merged": (MergeLinears(),),
    "absorbed": (AbsorbMLA(dynamic=True),),
    "both": (AbsorbMLA(dynamic=True), MergeLinears()),
}
CASES = [(1, 1, 128), (1, 1, 1024), (4, 1, 1024), (1, 128, 1)]  # batch, new tokens, cached tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for title, config in CONFIGS.items():
        decoder, past_of = cached_decoder(moec.models.build(config))
        args, shapes = example(past_of)
        graph = trace(decoder, args, dynamic_shapes=shapes, check=False).graph
        programs = {}
        for name, passes in VARIANTS.items():
            if config.is_mla or name in ("default", "merged"):
                pipeline = default_pipeline().insert_after("fuse", *passes) if passes else None
                programs[name] = moec.compile(graph, backend="onnxruntime", threads=1, passes=pipeline)
        print(title)
        for batch, new, past in CASES:
            cache = [torch.randn(*t.shape[:2], past, t.shape[3]) * 0.1 for t in past_of(batch, 2)]
            inputs = [torch.randint(0, 29, (batch, new)), torch.ones(batch, past + new, dtype=torch.int64), *cache]
            best = dict.fromkeys(programs, float("inf"))
            for _ in range(runs):
                for name, program in programs.items():
                    start = time.perf_counter()
                    program(*inputs)
                    best[name] = min(best[name], time.perf_counter() - start)
            times = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in best.items())
            print(f"  batch {batch}, {new} new, {past} cached: {times}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
