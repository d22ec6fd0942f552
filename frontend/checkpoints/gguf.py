"""GGUF files (ggml's specification, docs/gguf.md) of Llama, Qwen2 and Qwen3-MoE, by the `gguf` package.

Quantised tensors are dequantised by the package, each when it is read. llama.cpp stores the query and key rows of Llama
so that rotated pairs are neighbours; our rotation takes them in that order, and the rows stay as they are.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from moec.frontend.checkpoints.checkpoint import TOKENIZER, Checkpoint
from moec.frontend.checkpoints.counts import check_counts
from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.files import CheckpointFolder
from moec.frontend.checkpoints.gguf_header import check_header
from moec.frontend.checkpoints.gguf_metadata import Metadata, read_metadata
from moec.ir import CompileError, DType

_PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of the file, or one expert of a stack; `shape` in the order of torch, `start` where its bytes begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Any
    file: IO[bytes]
    start: int
    nbytes: int

    def load(self) -> torch.Tensor:
        """f16 and bf16 as they are stored, everything else in f32. The mapping of the file ends with the tensor."""
        import gguf

        where = f"/dev/fd/{self.file.fileno()}"
        raw = np.memmap(where, np.uint8, "c", offset=self.start, shape=(self.nbytes,))
        if self.kind.name in _PLAIN:
            return torch.from_numpy(raw).view(DType(self.dtype).torch).reshape(self.shape)
        rows = raw.reshape(int(np.prod(self.shape[:-1])), -1)
        return torch.from_numpy(gguf.dequantize(rows, self.kind)).reshape(self.shape)

    def expert(self, index: int) -> GGUFTensor:
        """Matrix `index` of a stack."""
        size = self.nbytes // self.shape[0]
        stem = self.name.removesuffix(".weight")
        start = self.start + index * size
        return GGUFTensor(f"{stem}.{index}.weight", self.dtype, self.shape[1:], self.kind, self.file, start, size)


def open_gguf(path: Path) -> Checkpoint:
    """Read the metadata of a file. Raises CompileError listing all that is wrong with it."""
    problems = Problems(str(path))
    with CheckpointFolder(path.parent) as folder:
        with folder.opened(path.name) as fd:
            file = os.fdopen(os.dup(fd), "rb")
        tokenizer = folder.read(TOKENIZER) if folder.has(TOKENIZER) else None
    reader = _reader(file, problems)
    metadata = Metadata(_contents(reader, problems), problems)
    tensors: dict[str, GGUFTensor] = {}
    for t in reader.tensors:
        tensor = _tensor(t, file, problems)
        if tensor is None:
            continue
        stacked = re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight", t.name) and len(tensor.shape) == 3
        if stacked and tensor.shape[0] <= tensor.nbytes:  # more would be matrices of nothing
            tensors |= {e.name: e for e in map(tensor.expert, range(tensor.shape[0]))}
        else:
            tensors[t.name] = tensor
    problems.check()
    embedding = tensors.get("token_embd.weight")
    fields, tokens = read_metadata(metadata, None if embedding is None else embedding.shape[0])
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    fields["qkv_bias"] = "blk.0.attn_q.bias" in tensors
    fields["o_bias"] = "blk.0.attn_output.bias" in tensors
    factors = tensors.pop("rope_freqs.weight", None)
    problems.check()
    check_counts(fields, tensors, problems)
    dtype = DType(embedding.dtype) if embedding is not None and embedding.kind.name in _PLAIN else DType.F32
    return Checkpoint(path, fields, dtype, None, tensors, gguf_name, tokens, tokenizer, problems, factors)


def _reader(file: IO[bytes], problems: Problems) -> Any:
    try:
        import gguf
    except ImportError:
        raise CompileError("reading .gguf files needs the package gguf", code="gguf", hint="pip install gguf") from None
    try:
        check_header(file)
        return gguf.GGUFReader(f"/dev/fd/{file.fileno()}")
    except Exception as e:  # the package raises many kinds on a damaged file
        file.close()
        problems.add(f"no GGUF file, or damaged: {e}")
        problems.stop()


def _contents(reader: Any, problems: Problems) -> dict[str, Any]:
    found = {}
    for name, field in reader.fields.items():
        if _is_short(field):
            try:
                found[name] = field.contents()
            except ValueError as e:  # a string that is no UTF-8
                problems.add(f"{name} cannot be read: {e}")
    return found


def _is_short(field: Any) -> bool:
    """Numbers, strings and short lists; vocabularies are left alone."""
    return len(field.data) <= 64 and bool(field.types)


def _tensor(t: Any, file: IO[bytes], problems: Problems) -> GGUFTensor | None:
    kind, start, nbytes = t.tensor_type, int(t.data_offset), int(t.n_bytes)
    if kind.name not in _PLAIN and kind.name not in _QUANTISED:
        problems.add(f"{t.name} is stored in {kind.name}, supported are {', '.join([*_PLAIN, *_QUANTISED])}")
        return None
    if start + nbytes > os.fstat(file.fileno()).st_size:
        problems.add(f"{t.name} ends at byte {start + nbytes}, after the end of the file: it is truncated")
        return None
    shape = tuple(int(n) for n in reversed(t.shape.tolist()))
    return GGUFTensor(t.name, _PLAIN.get(kind.name, "f32"), shape, kind, file, start, nbytes)


def gguf_name(name: str) -> str:
    """What a parameter of our model is called in the file; experts by their number."""
    stem, last = name.rsplit(".", 1)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return f"{_NAMES.get(stem, stem)}.{last}"
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", layer[2])
    if expert is not None:
        return f"blk.{layer[1]}.ffn_{expert[2]}_exps.{expert[1]}.{last}"
    return f"blk.{layer[1]}.{_NAMES.get(layer[2], layer[2])}.{last}"
