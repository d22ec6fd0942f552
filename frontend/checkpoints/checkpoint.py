"""A checkpoint: what its config says, and its tensors, none of them read yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.frontend.checkpoints.bind import Binder, Shape, Tensor
from moec.frontend.checkpoints.counts import check_counts
from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.files import CheckpointFolder
from moec.frontend.checkpoints.hf_config import read_config
from moec.frontend.checkpoints.quantization import BlockFP8, read_quantization
from moec.frontend.checkpoints.shards import read_shards
from moec.ir import DType, Weight

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"

_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`fields` are those of `moec.models.ModelConfig`, `dtype` is what the model computes in, `tokens` holds
    eos_token_id, pad_token_id and bos_token_id where the files say them, `tokenizer` the text of tokenizer.json,
    `rope_divisors` what each rotary frequency is divided by where a file says so."""

    path: Path
    fields: dict[str, Any]
    dtype: DType
    quantization: BlockFP8 | None
    tensors: Mapping[str, Tensor]
    stored_as: Callable[[str], str]
    tokens: dict[str, Any]
    tokenizer: bytes | None
    problems: Problems
    rope_divisors: Tensor | None = None

    def bind(self, expected: Mapping[str, Shape]) -> dict[str, Weight]:
        """A lazy weight for every parameter of the model, by its name and shape there.

        Raises CompileError listing every tensor that is missing, left over, or of another shape or dtype, everything
        that was wrong with the files, and scales that are no positive finite numbers.
        """
        weights = Binder(self.tensors, self.dtype, self.quantization, self.problems).bind(expected, self.stored_as)
        self.problems.check()
        return weights


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint."""
    try:
        return (path / CONFIG).exists() or any(path.glob("model*.safetensors*"))
    except (OSError, ValueError):  # a name that no folder can have
        return False


def open_folder(path: Path) -> Checkpoint:
    """Read the configs and the headers of the shards. Raises CompileError; what `bind` can still add to is kept for
    it."""
    problems = Problems(str(path))
    with CheckpointFolder(path) as folder:
        if not folder.has(CONFIG):
            problems.add(f"{CONFIG} is missing")
            problems.stop()
        config = folder.json(CONFIG)
        kind, fields = read_config(config, problems)
        quantization = read_quantization(config, problems)
        # sizes that are wrong would make every tensor a mismatch
        problems.check()
        tensors = read_shards(folder, problems)
        tokens = _tokens(config, folder.json(GENERATION) if folder.has(GENERATION) else {}, problems)
        tokenizer = folder.read(TOKENIZER) if folder.has(TOKENIZER) else None
    dtype = _dtype(config, tensors, problems)
    check_counts(fields, tensors, problems)
    naming = _mixtral_name if kind == "mixtral" else _same_name
    return Checkpoint(path, fields, dtype, quantization, tensors, naming, tokens, tokenizer, problems)


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, Tensor], problems: Problems) -> DType:
    """What the config says, else what the embedding is stored in."""
    said = config.get("dtype", config.get("torch_dtype"))
    if said is None:
        embedding = tensors.get("model.embed_tokens.weight")
        return DType(embedding.dtype) if embedding is not None and embedding.dtype in _DTYPES.values() else DType.F32
    if not isinstance(said, str) or said not in _DTYPES:
        problems.add(f"{CONFIG}: dtype is {said!r}, supported are {', '.join(_DTYPES)}")
        return DType.F32
    return DType(_DTYPES[said])


def _tokens(config: Mapping[str, Any], generation: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    found = {}
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = generation.get(name, config.get(name))
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is None:
            continue
        if all(type(i) is int and i >= 0 for i in ids):
            found[name] = value
        elif value != -1:  # "none" in older configs
            problems.add(f"{name} is {value!r}, expected a token id")
    return found


def _same_name(name: str) -> str:
    return name


_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _mixtral_name(name: str) -> str:
    *_, last, _ = name.split(".") if "." in name else ("", name, "")
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return name.replace(last, _MIXTRAL[last]) if ".experts." in name and last in _MIXTRAL else name
