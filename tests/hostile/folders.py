"""A small model, saved, and ways to look at its folder and to change what its manifest says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

import moec
from moec.files import digest_file
from moec.manifest import manifest_digest

MLP = """graph(%x: f32[T, 8], %n: i64[T]) -> (%y: f32[T, 8], %m: i64[T]) {
  weight @up: f32[16, 8]
  weight @down: f32[8, 16]
  %0: f32[T, 16] = linear.linear(%x, @up)
  %1: f32[T, 16] = math.silu(%0)
  %2: f32[T, 8] = linear.linear(%1, @down)
  return %2, %n
}
"""


def model() -> moec.Graph:
    graph = moec.parse(MLP)
    g = torch.Generator().manual_seed(0)
    graph.bind_weights({"up": torch.randn(16, 8, generator=g), "down": torch.randn(8, 16, generator=g)})
    return graph


INPUTS = (torch.linspace(-1, 1, 24).reshape(3, 8), torch.arange(3))
NAMES = ["manifest.json", "forward.ir", "weights.safetensors", "forward/model.onnx", "forward/onnxruntime.json"]


def saved(folder: Path, backend: str = "onnxruntime") -> torch.Tensor:
    """A model in `folder`; its first result."""
    compiled = moec.compile(model(), backend=backend, threads=1)
    compiled.save(folder)
    return compiled(*INPUTS)[0]


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below, with its contents."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
        for p in sorted(folder.rglob("*"))
    }


def sign(folder: Path, *names: str) -> None:
    """Make the manifest agree with changed files, as who crafts a folder would."""
    data = json.loads((folder / "manifest.json").read_text())
    for name in names:
        path = folder / name
        data["files"][name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    write(folder, data)


def write(folder: Path, data: dict) -> None:
    data["sha256"] = manifest_digest(data)
    (folder / "manifest.json").write_text(json.dumps(data))
