"""Models of the matrix that are no causal language models: what to build, and inputs of a batch and a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
_BATCH, _LENGTH = "B", "T"


@dataclass(frozen=True)
class Other:
    """`shown`: what it is built from. `inputs(batch, length, r)` gives the keyword arguments, `dynamic` their axes."""

    shown: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, torch.Generator], Inputs]
    dynamic: dict[str, dict[int, str]]


def _ids(batch: int, length: int, r: torch.Generator) -> torch.Tensor:
    return torch.randint(3, 29, (batch, length), generator=r)


def _bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(vocab_size=29, hidden_size=40, intermediate_size=56, num_attention_heads=4,
                                     num_hidden_layers=2, max_position_embeddings=128)  # fmt: skip
    return transformers.AutoModelForMaskedLM.from_config(config)


def _masked(batch: int, length: int, r: torch.Generator) -> Inputs:
    """The last positions of each second row are padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1::2, max(length - 3, 1) :] = 0
    return {"input_ids": _ids(batch, length, r), "attention_mask": mask}


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=29, d_model=40, d_ff=56, d_kv=10, num_heads=4, num_layers=2,
                                   decoder_start_token_id=0, use_cache=False)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _recurrent(kind: str) -> Other:
    def build() -> nn.Module:
        layer: nn.Module = getattr(nn, kind)(40, 24, 2, batch_first=True, bidirectional=True)
        return layer

    shown = f"nn.{kind}, two layers, both ways"
    return Other(shown, build, lambda b, t, r: {"input": torch.randn(b, t, 40, generator=r)}, {"input": _AXES})


_AXES = {0: _BATCH, 1: _LENGTH}
OTHERS: dict[str, Other] = {
    "bert": Other("BertConfig, masked language model", _bert, _masked, {"input_ids": _AXES, "attention_mask": _AXES}),
    "t5": Other(
        "T5Config, encoder and decoder", _t5,
        lambda b, t, r: {"input_ids": _ids(b, t, r), "decoder_input_ids": _ids(b, t // 2 + 1, r)},
        {"input_ids": _AXES, "decoder_input_ids": {0: _BATCH, 1: "S"}},
    ),
    "transformer_encoder": Other(
        "nn.TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(40, 4, 56, batch_first=True), 2),
        lambda b, t, r: {"src": torch.randn(b, t, 40, generator=r)}, {"src": _AXES},
    ),
    "lstm": _recurrent("LSTM"), "gru": _recurrent("GRU"), "rnn": _recurrent("RNN"),
}  # fmt: skip
