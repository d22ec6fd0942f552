"""The whole pipeline on the shipped trained model; every figure is measured while it runs. See `make demo`."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

import moec
from moec import models

console = Console(width=max(100, min(140, Console().width)), highlight=False)
PROMPTS = (b"KING HENRY.\n", b"import os\nimport sys\n\ndef ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=6, help="KiB of held-out text a domain to measure loss on")
    parser.add_argument("--new-bytes", type=int, default=200, help="bytes to generate")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # torch.export's own
    start = time.perf_counter()
    model = models.trained()
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"The shipped model: {parameters / 1e6:.1f} M parameters, "
                  f"{model.config.num_experts} routed experts, top {model.config.top_k}")  # fmt: skip
    graph = traced(model)
    passes(graph)
    quantised = moec.compile(graph, backend="onnxruntime", quantize="fp8")
    coverage(quantised)
    placement(model, graph)
    agreement(model, graph)
    loss(model, graph, quantised, options.sample << 10)
    generation(model, options.new_bytes)
    console.print(f"\nTook {time.perf_counter() - start:.0f} s.")


@contextmanager
def section(title: str) -> Iterator[None]:
    console.print(f"\n[bold]{title}[/bold]")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s[/dim]")


def traced(model: torch.nn.Module) -> moec.Graph:
    with section("1. Trace: torch.export → IR, dynamic batch and sequence"):
        example = torch.arange(2 * 24).reshape(2, 24)
        graph = moec.trace(model, (example,), dynamic_shapes=({0: "B", 1: "S"},))
        console.print(f"{len(graph)} nodes, {len(graph.weights)} weights, input {graph.inputs[0].type}")
    return graph


def passes(graph: moec.Graph) -> None:
    with section("2. Passes: float32 for ONNX Runtime"):
        compiled = moec.compile(graph, backend="onnxruntime")
        for table in compiled.report.tables():
            console.print(table)
        ops = compiled.graph.count_ops()
        console.print(f"{len(compiled.graph)} nodes: " + ", ".join(f"{op} ×{n}" for op, n in ops.items()))


def coverage(quantised: moec.CompiledModel) -> None:
    with section('3. quantize="fp8": weights in 128×128 blocks, activations per token'):
        figures = quantised.report.to_dict()["programs"]["forward"]["figures"]
        share, total = figures["quantize_weights.share"], figures["quantize_weights.candidate_bytes"]
        console.print(f"{share:.1%} of {total:,} bytes of linear and expert weights are stored in FP8")
        for left in figures["quantize_weights.left"]:
            console.print(f"  left: {left['weight']} ({left['bytes']:,} bytes): {left['reason']}", markup=False)


def placement(model: models.MoETransformer, graph: moec.Graph) -> None:
    gpus, spare = 4, 1
    slots = model.config.num_experts // gpus + spare
    with section(f"4. Expert placement: {gpus} GPUs with {slots} slots a layer ({gpus * spare} redundant)"):
        table = Table("layer", "domain", "hottest expert / mean", "plain", "placed", "lower bound")
        texts = {d: models.heldout_text(d)[: 8 << 10] for d in ("literature", "code")}
        loads = {d: models.expert_load(model, text) for d, text in texts.items()}
        layers = sorted(next(iter(loads.values())))
        both = torch.stack([sum(loads[d][layer] for d in texts) for layer in layers])
        mesh = moec.Mesh(nodes=1, gpus_per_node=gpus, slots_per_gpu=slots)
        placed = moec.place_experts(both, mesh)
        for row, layer in enumerate(layers):
            for domain in (*texts, "both"):
                load = both[row] if domain == "both" else loads[domain][layer]
                hottest = float(load.max() / load.mean())
                plain = float(load.reshape(gpus, -1).sum(-1).max() / (load.sum() / gpus))
                cells = [f"{x:.3f}" for x in (hottest, plain, balance(placed, row, load))]
                bound = f"{placed.lower_bound[row]:.3f}" if domain == "both" else ""
                table.add_row(str(layer), domain, *cells, bound)
        console.print(table)
        ids = text_ids(64)
        plain_run = moec.compile(graph, backend="onnxruntime")(ids)[0]
        placed_run = moec.compile(graph, backend="onnxruntime", placement=placed)(ids)[0]
        change = float((plain_run - placed_run).abs().max())
        console.print(f"placed on one process, the logits change by {change:.1g} (neutral)")
        assert change < 1e-4, "placement must not change the result"


def balance(placed: moec.Placement, row: int, load: torch.Tensor) -> float:
    """Busiest GPU over the mean GPU under a load, replicas sharing an expert's load equally."""
    slots = torch.tensor(placed.physical_to_logical[row])
    share = load / torch.bincount(slots, minlength=len(load))
    per_gpu = share[slots].reshape(placed.mesh.num_gpus, -1).sum(-1)
    return float(per_gpu.max() / per_gpu.mean())


def agreement(model: torch.nn.Module, graph: moec.Graph) -> None:
    with section("5. Agreement: float32 end to end (Triton in its interpreter)"):
        ids = text_ids(8)
        comparison = moec.compare(graph, (ids,), backends=("reference", "onnxruntime", "triton"))
        console.print(str(comparison), markup=False)
        assert comparison.ok
        reference = moec.compile(graph, backend="reference")(ids)[0]
        with torch.no_grad():
            console.print(f"PyTorch against the reference: max error {float((model(ids) - reference).abs().max()):.2g}")
    with section("6. Agreement: FP8, every op by itself on the reference's operands and codes"):
        comparison = moec.compare(
            graph, (text_ids(5),), backends=("reference", "onnxruntime", "triton"), quantize="fp8", isolated=True
        )
        console.print(str(comparison), markup=False)
        assert comparison.ok


def loss(model: torch.nn.Module, graph: moec.Graph, quantised: moec.CompiledModel, sample: int) -> None:
    with section(f"7. Loss on {sample >> 10} KiB of held-out text a domain, bits per byte"):
        compiled = {
            "reference": moec.compile(graph, backend="reference"),
            "onnxruntime": moec.compile(graph, backend="onnxruntime"),
            "onnxruntime, FP8": quantised,
        }
        runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"PyTorch": model}
        runs |= {name: lambda ids, c=c: c(ids)[0] for name, c in compiled.items()}
        table = Table("", "literature", "code", "both", "change")
        first = 0.0
        for name, run in runs.items():
            each = [models.bits_per_byte(run, models.heldout_text(d)[:sample]) for d in ("literature", "code")]
            both = sum(each) / 2
            first = first or both
            table.add_row(name, *(f"{x:.4f}" for x in (*each, both)), f"{both / first - 1:+.3%}")
        console.print(table)


def generation(model: models.MoETransformer, count: int) -> None:
    with section(f"8. Generation: {count} bytes a prompt, float32, KV cache"):
        compiled = moec.compile(model, backend="onnxruntime")
        warm = torch.tensor([list(PROMPTS[0])])
        compiled.generate(warm, max_new_tokens=2)
        eager(model, warm, 2)
        seconds = {"PyTorch": 0.0, "onnxruntime": 0.0}
        for text in PROMPTS:
            prompt = torch.tensor([list(text)])
            start = time.perf_counter()
            mine = compiled.generate(prompt, max_new_tokens=count, eos_token_id=None)
            middle = time.perf_counter()
            theirs = eager(model, prompt, count)
            seconds["onnxruntime"] += middle - start
            seconds["PyTorch"] += time.perf_counter() - middle
            console.print(bytes(mine[0].tolist()).decode("utf-8", "replace"), style="green", markup=False)
            assert torch.equal(mine, theirs), "PyTorch and ONNX Runtime must generate the same text"
        console.print("identical from PyTorch and ONNX Runtime")
        table = Table("", "tokens/s")
        for name, spent in seconds.items():
            table.add_row(name, f"{count * len(PROMPTS) / spent:.0f}")
        console.print(table)


@torch.no_grad()
def eager(model: models.MoETransformer, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The model's own greedy loop with its KV cache."""
    step, past = ids, model.empty_cache(len(ids))
    for _ in range(count):
        result = model(step, past=past)
        assert isinstance(result, tuple)
        logits, past = result
        step = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, step), dim=1)
    return ids


def text_ids(length: int) -> torch.Tensor:
    return torch.tensor([list(models.heldout_text("code")[:length])])


if __name__ == "__main__":
    main()
