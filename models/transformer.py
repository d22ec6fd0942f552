"""`MoETransformer`: a decoder-only language model, dense or with routed experts, KV cache, multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moec.models.attention import Cache, GroupedQueryAttention, LatentAttention
from moec.models.model_config import ModelConfig
from moec.models.moe import Experts, MoE, Router, SwiGLU
from moec.models.norm import RMSNorm
from moec.models.rope import RotaryEmbedding

Tables = tuple[Tensor, Tensor]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals. hidden [B, S, d] → ([B, S, d], extended cache)."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LatentAttention(config) if config.is_mla else GroupedQueryAttention(config)
        self.mlp = SwiGLU(d, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(d, eps)
        self.post_attention_layernorm = RMSNorm(d, eps)

    def forward(
        self, hidden: Tensor, tables: Tables, mask: Tensor | None, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        y, cache = self.self_attn(self.input_layernorm(hidden), tables, mask, past)
        hidden = hidden + y
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache


class SharedHead(nn.Module):
    """Holds the norm before the shared output head of one prediction depth."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """One depth of multi-token prediction (DeepSeek-V3, arXiv:2412.19437 §2.2, equations 21-23).

    Joins the previous depth's hidden state at position i with the embedding of the token after it and runs one
    decoder layer. State names follow DeepSeek's checkpoints, where this is `layers.{num_layers + depth}`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, dense=False)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(d, eps)
        self.hnorm = RMSNorm(d, eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.shared_head = SharedHead(config)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """[B, S, d] twice → [B, S, d]."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))


class Decoder(nn.Module):
    """Embedding, decoder layers, then the MTP layers (which the plain forward leaves out), final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [DecoderLayer(config, i < config.first_k_dense) for i in range(config.num_layers)]
        layers += [MTPLayer(config) for _ in range(config.num_mtp_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)


class MoETransformer(nn.Module):
    """The language model. Parameters follow the names of DeepSeek-V3, Mixtral, Qwen3-MoE, Llama and Qwen2 in
    transformers 5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past: Sequence[Cache] | None = None,
    ) -> Tensor | tuple[Tensor, list[Cache]]:
        """Logits of the next token at every position.

        input_ids i64[B, S]; attention_mask i64[B, P+S], 1 for tokens and 0 for (left) padding, None for no padding;
        past: one cache per layer holding P positions (see `empty_cache`). Returns logits [B, S, vocab_size] and,
        when past is given, the caches extended to P+S positions.
        Positions count the tokens of a row, so that a left-padded row computes what it would alone; logits at padding
        are finite and meaningless. Raises ValueError when past has the wrong number of layers or
        attention_mask another length than P+S.
        """
        hidden, caches = self._decode(input_ids, attention_mask, past)
        logits = self.lm_head(self.model.norm(hidden))
        return logits if past is None else (logits, caches)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The last layer's output before the final norm, [B, S, hidden_size]: what `mtp_logits` starts from."""
        return self._decode(input_ids, attention_mask, None)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: [B, S, hidden_size] → [B, S, vocab_size]."""
        return self.lm_head(self.model.norm(hidden))

    def mtp_hidden(
        self, hidden: Tensor, next_ids: Tensor, attention_mask: Tensor | None = None, depth: int = 0
    ) -> Tensor:
        """Hidden state of MTP depth `depth`, [B, S, hidden_size].

        hidden: `hidden_states` (depth 0) or the previous depth's result; next_ids i64[B, S]: at position i the token
        i + depth + 1. Raises ValueError if the model has no such depth.
        """
        layer = self._mtp_layer(depth)
        joined = layer.join(hidden, self.model.embed_tokens(next_ids))
        tables, mask = self._positions(next_ids, attention_mask, 0, False, joined.dtype)
        return layer(joined, tables, mask)[0]

    def mtp_logits(
        self, hidden: Tensor, next_ids: Tensor, attention_mask: Tensor | None = None, depth: int = 0
    ) -> Tensor:
        """Logits [B, S, vocab_size] of token i + depth + 2 at position i. Arguments and errors as `mtp_hidden`."""
        y = self.mtp_hidden(hidden, next_ids, attention_mask, depth)
        return self.lm_head(self._mtp_layer(depth).shared_head.norm(y))

    def draft_step(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Cache], known: Tensor
    ) -> tuple[Tensor, Tensor, list[Cache]]:
        """One step of greedy speculative decoding (DeepSeek-V3, arXiv:2412.19437 §5.4.3) by the first MTP layer.

        input_ids i64[B, S], S ≥ 2; attention_mask i64[B, P+S], 0 for padding and for refused drafts; past: a cache per
        layer and one of the MTP layer (`empty_cache(batch, mtp=True)`); known i64[B, 1]: 1 where the last id is known
        to follow the one before it (a prompt), 0 where it is a draft. Returns (tokens i64[B, 2]: the likeliest after
        each of the last two positions, drafts i64[B, 2]: the MTP layer's guess of what follows each of these, caches of
        P+S positions). Raises ValueError if the model has no MTP layer.
        """
        layer, count = self._mtp_layer(0), self.config.num_layers
        hidden, caches = self._decode(input_ids, attention_mask, past[:count])
        first = input_ids.shape[1] - 2  # of the last two; narrow, as negative indices hide S ≥ 2 from export
        tokens = self.logits(hidden.narrow(1, first, 2)).argmax(dim=-1)
        before_last = torch.where(known.bool(), input_ids.narrow(1, first + 1, 1), tokens[:, :1])
        next_ids = torch.cat((input_ids.narrow(1, 1, first), before_last, tokens[:, 1:]), dim=1)
        joined = layer.join(hidden, self.model.embed_tokens(next_ids))
        length = past[count][0].shape[2]
        tables, mask = self._positions(input_ids, attention_mask, length, True, joined.dtype)
        y, cache = layer(joined, tables, mask, past[count])
        drafts = self.lm_head(layer.shared_head.norm(y.narrow(1, first, 2))).argmax(dim=-1)
        return tokens, drafts, [*caches, cache]

    def _mtp_layer(self, depth: int) -> MTPLayer:
        if not 0 <= depth < self.config.num_mtp_layers:
            raise ValueError(f"depth is {depth}, but the model has {self.config.num_mtp_layers} MTP layers")
        layer = self.model.layers[self.config.num_layers + depth]
        assert isinstance(layer, MTPLayer)
        return layer

    def empty_cache(self, batch: int, dtype: torch.dtype | None = None, *, mtp: bool = False) -> list[Cache]:
        """Zero-length `past` for `batch` rows in `dtype` (default: the model's), one pair per layer; with `mtp` one
        more, of the first MTP layer.

        MHA/GQA: k, v [B, num_kv_heads, 0, head_dim]. MLA: [B, 1, 0, kv_lora_rank], [B, 1, 0, qk_rope_head_dim].
        """
        c = self.config
        if c.kv_lora_rank is not None:
            first, second = (batch, 1, 0, c.kv_lora_rank), (batch, 1, 0, c.qk_rope_head_dim)
        else:
            first = second = (batch, c.num_kv_heads, 0, c.head_dim)
        like = self.lm_head.weight
        dtype = dtype or like.dtype
        count = c.num_layers + mtp
        return [(like.new_empty(first, dtype=dtype), like.new_empty(second, dtype=dtype)) for _ in range(count)]

    def _decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, past: Sequence[Cache] | None
    ) -> tuple[Tensor, list[Cache]]:
        count = self.config.num_layers
        if past is not None and len(past) != count:
            raise ValueError(f"past has {len(past)} layers, the model {count}")
        hidden = self.model.embed_tokens(input_ids)
        past_length = past[0][0].shape[2] if past is not None else 0
        tables, mask = self._positions(input_ids, attention_mask, past_length, past is not None, hidden.dtype)
        window = self._window(input_ids.shape[1], past_length, mask) if self.config.sliding_window else None
        caches = []
        for index in range(count):
            layer_past = past[index] if past is not None else None
            seen = window if self.config.is_sliding(index) else mask
            hidden, cache = self.model.layers[index](hidden, tables, seen, layer_past)
            caches.append(cache)
        return hidden, caches

    def _positions(
        self, ids: Tensor, attention_mask: Tensor | None, past_length: int, cached: bool, dtype: torch.dtype
    ) -> tuple[Tables, Tensor | None]:
        """Rotary tables for the S new positions and the mask bool[B or 1, 1, S, P+S]; None: plain causal."""
        length = ids.shape[1]
        new = torch.arange(length, device=ids.device) + past_length
        if attention_mask is None:
            positions = new.unsqueeze(0)
        else:
            if attention_mask.shape[1] != length + past_length:
                raise ValueError(
                    f"attention_mask covers {attention_mask.shape[1]} of {past_length} + {length} positions"
                )
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).narrow(1, past_length, length)
        tables = self.model.rotary_emb(positions, dtype)
        if attention_mask is None and not cached:
            return tables, None
        keys = torch.arange(length + past_length, device=ids.device)
        mask = (keys <= new.unsqueeze(1))[None, None]
        if attention_mask is not None:
            # A padding row sees no key; letting every position see itself keeps its softmax finite on any backend.
            itself = keys == new.unsqueeze(1)
            mask = (mask & attention_mask[:, None, None, :].bool()) | itself
        return tables, mask

    def _window(self, length: int, past_length: int, mask: Tensor | None) -> Tensor:
        """`mask` of S new positions over P+S keys, narrowed to the sliding window: bool[B or 1, 1, S, P+S]."""
        device, window = self.lm_head.weight.device, self.config.sliding_window
        assert window is not None
        keys = torch.arange(length + past_length, device=device)
        new = (torch.arange(length, device=device) + past_length).unsqueeze(1)
        near = (keys > new - window)[None, None]
        return near & (keys <= new) if mask is None else near & mask

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> MoETransformer:
        """A model that uses `tensors` (state-dict names, all on one device) without copying, in eval mode.

        Raises ValueError naming missing, unknown or wrongly shaped tensors.
        """
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        if config.tie_word_embeddings and "lm_head.weight" not in tensors:
            tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(f"weights do not fit the config: missing {missing[:5]}, unknown {unknown[:5]}")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, the config wants {list(expected[name].shape)}"
                )
        model.load_state_dict(tensors, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        with torch.device(model.lm_head.weight.device):
            model.model.rotary_emb = RotaryEmbedding(config)  # not part of the state; was on meta
        return model.eval()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights from `seed`, the same on every machine: normal with variance 1/fan-in, embeddings with 1,
        projections into the residual stream smaller by sqrt(2 · layers), biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        into_residual = (2 * self.config.num_layers) ** -0.5

        def fill(weight: Tensor, std: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                fill(module.weight, 1.0)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                fill(module.weight, std * into_residual if name.endswith(("o_proj", "down_proj")) else std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Experts):
                fill(module.gate_up_proj, module.gate_up_proj.shape[2] ** -0.5)
                fill(module.down_proj, module.down_proj.shape[2] ** -0.5 * into_residual)
            elif isinstance(module, Router):
                fill(module.weight, module.weight.shape[1] ** -0.5)
                if module.scoring == "sigmoid":
                    module.e_score_correction_bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
