"""Measures the shipped checkpoint on the held-out text: `python -m moec.models.measure` prints README's tables."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moec.models.checkpoint import WEIGHTS, trained
from moec.models.data import DOMAINS, heldout_text
from moec.models.evaluate import bits_per_byte, expert_load, mtp_accept_rate

PART = 16384


def tables(folder: Path = WEIGHTS) -> str:
    """Markdown: bits per byte, MTP accept rate, and expert load, of the checkpoint in `folder`."""
    model = trained(folder)
    texts = {domain: heldout_text(domain) for domain in DOMAINS}
    lines = ["| domain | held-out bits/byte | of its first 16 KiB | MTP accept rate |", "|---|---|---|---|"]
    for domain, text in texts.items():
        bits = f"{bits_per_byte(model, text):.4f} | {bits_per_byte(model, text[:PART]):.4f}"
        lines.append(f"| {domain} | {bits} | {mtp_accept_rate(model, text):.3f} |")
    lines += ["", "| | |", "|---|---|"]
    lines.append(
        f"| MTP accept rate, first 16 KiB of both domains | {mtp_accept_rate(model, heldout_text()[:PART]):.3f} |"
    )
    loads = {domain: expert_load(model, text) for domain, text in texts.items()}
    parts = {domain: expert_load(model, text[:PART]) for domain, text in texts.items()}
    lines += ["", "| layer | domain | max/mean, first 16 KiB | max/mean | load of experts 0-15, % of routed pairs |"]
    lines.append("|---|---|---|---|---|")
    for layer in loads[DOMAINS[0]]:
        for domain in DOMAINS:
            load, part = loads[domain][layer], parts[domain][layer]
            shares = " ".join(f"{100 * share:.1f}" for share in load.tolist())
            ratios = f"{float(part.max() / part.mean()):.2f} | {float(load.max() / load.mean()):.2f}"
            lines.append(f"| {layer} | {domain} | {ratios} | {shares} |")
    lines += ["", "| layer | share of routed pairs that would move between the domains |", "|---|---|"]
    for layer, load in loads["literature"].items():
        moved = 0.5 * float((load - loads["code"][layer]).abs().sum())
        mixed = (load + loads["code"][layer]) / 2
        lines.append(
            f"| {layer} | {100 * moved:.0f}% (max/mean of the even mix: {float(mixed.max() / mixed.mean()):.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moec.models.measure", description=__doc__)
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="checkpoint folder")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(tables(options.folder))


if __name__ == "__main__":
    main()
