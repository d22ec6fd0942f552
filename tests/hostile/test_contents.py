"""Contents that lie, under a manifest that agrees with them: pickles, wrong headers of weights, random damage."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch

import moec
from moec.graph_file import load_graph, save_graph
from moec.ir import ArtifactError, CompileError

from .effects import harmless, refused
from .folders import INPUTS, NAMES, model, saved, sign, tree
from .limits import limited


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@limited()
def test_pickles_are_never_read(tmp_path):
    folder, fired = tmp_path / "saved", tmp_path / "fired"
    saved(folder)
    torch.save({"up": Bomb(fired)}, tmp_path / "bomb.pt")
    for name in NAMES:
        for content in (pickle.dumps(Bomb(fired)), (tmp_path / "bomb.pt").read_bytes()):
            original = (folder / name).read_bytes()
            (folder / name).write_bytes(content)
            if name != "manifest.json":
                sign(folder, name)
            with refused(Path(name).name, ArtifactError):
                moec.load(folder)
            (folder / name).write_bytes(original)
            if name != "manifest.json":
                sign(folder, name)
    for suffix in (".ir", ".onnx", ".pt2", ".pt", ".safetensors", ".json"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(pickle.dumps(Bomb(fired)))
        for use in (load_graph, moec.compile, moec.load):
            with pytest.raises(CompileError):
                use(path)
            with pytest.raises(CompileError):
                use(str(path))
    assert not fired.exists()


def header(data: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(data) if size is None else size) + data + body


def tensors(**fields: object) -> bytes:
    return json.dumps(fields).encode()


GOOD = {"dtype": "F32", "shape": [16, 8], "data_offsets": [0, 512]}


WEIGHTS = [
    b"", b"\0" * 7, header(b""), header(b"{}"), header(b"{}", 2**63), header(b"{}", 2**64 - 1),
    header(b"{}", 100_000_000), header(b"{}", 99_999_999), header(b"[" * 10_000), header(b"{" * 10_000),
    header(b'{"up":' * 5000), header(b"\xff" * 8),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [512, 1024]}), body=b"\0" * 1000),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [0, 512]}), body=b"\0" * 512),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [256, 768]}), body=b"\0" * 768),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [1024, 1536]}), body=b"\0" * 1536),
    header(tensors(up=GOOD, down={**GOOD, "shape": [8, 16], "data_offsets": [512, 1024]}), body=b"\0" * 2048),
    header(tensors(up={**GOOD, "shape": [2**62, 2**62]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "shape": [2**64 + 16, 8]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "shape": [-16, -8]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "shape": [16, 9]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "data_offsets": [512, 0]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "data_offsets": [0, 2**63]}), body=b"\0" * 512),
    header(tensors(up={**GOOD, "dtype": "F31"}), body=b"\0" * 512),
    header(tensors(up={"dtype": "U16", "shape": [16, 16], "data_offsets": [0, 512]}), body=b"\0" * 512),
    header(tensors(up={"dtype": "F8_E8M0", "shape": [512], "data_offsets": [0, 512]}), body=b"\0" * 512),
    header(tensors(up=GOOD, __metadata__={"a": 1}), body=b"\0" * 512), header(tensors(up=None)), header(tensors(up=[])),
    header(b'{"up":' + json.dumps(GOOD).encode() + b',"up":' + json.dumps(GOOD).encode() + b"}", body=b"\0" * 512),
    header(tensors(**{"../up": GOOD}), body=b"\0" * 512),
]  # fmt: skip


@limited()
def test_weights_that_lie(tmp_path):
    folder = tmp_path / "saved"
    saved(folder)
    save_graph(model(), tmp_path / "model.ir", INPUTS)
    for i, content in enumerate(WEIGHTS):
        (folder / "weights.safetensors").write_bytes(content)
        sign(folder, "weights.safetensors")
        with refused("weights.safetensors", ArtifactError):
            moec.load(folder)
        if i in (0, 1, 2) or len(content) < 600:
            (tmp_path / "model.safetensors").write_bytes(content)
            with contextlib.suppress(CompileError):
                load_graph(tmp_path / "model.ir")


@limited()
def test_a_header_of_a_hundred_megabytes(tmp_path):
    """As long as the library takes, all of it entries: within the limits, whatever it says."""
    folder = tmp_path / "saved"
    saved(folder)
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    rows = ",".join(f'"t{i}":{entry}' for i in range(90_000_000 // (len(entry) + 12) // 8))
    text = b"{" + rows.encode() + b"}"
    (folder / "weights.safetensors").write_bytes(header(text.ljust(99_999_992)))
    sign(folder, "weights.safetensors")
    with refused("weights.safetensors", ArtifactError):
        moec.load(folder)


@limited(seconds=60)
def test_every_byte_of_a_folder(tmp_path):
    """Files damaged at random and signed: an ArtifactError, or a model that runs or says why not."""
    folder = tmp_path / "saved"
    saved(folder)
    r = random.Random(3)
    names = [n for n in tree(folder) if (folder / n).is_file() and n != "manifest.json"]
    for name in names:
        original = (folder / name).read_bytes()
        for _ in range(40):
            data = bytearray(original)
            for _ in range(r.choice((1, 1, 2, 8))):
                at = r.randrange(min(len(data), 2000))
                what = r.random()
                if what < 0.6:
                    data[at] = r.randrange(256)
                elif what < 0.8:
                    del data[at : at + r.choice((1, 4, 100))]
                else:
                    data[at:at] = bytes(r.randrange(256) for _ in range(r.choice((1, 8))))
                if not data:
                    break
            (folder / name).write_bytes(bytes(data))
            sign(folder, name)
            try:
                with harmless():
                    loaded = moec.load(folder)
            except ArtifactError:
                continue
            with contextlib.suppress(CompileError):
                loaded(*INPUTS)
        (folder / name).write_bytes(original)
        sign(folder, name)
    moec.load(folder)
