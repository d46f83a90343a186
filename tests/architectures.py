"""Tiny random models of many architectures, for every test that needs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 300

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ONE_HEAD_KIND: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = {**_ONE_HEAD_KIND, "num_key_value_heads": 2}
_HEAD_DIM: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_SLIDING: dict[str, Any] = {**_HEAD_DIM, "sliding_window": 8}  # short enough for a test's text to leave it
_GPT2: dict[str, Any] = {**_TOKENS, "n_embd": 64, "n_inner": 128, "n_layer": 3, "n_head": 4, "n_positions": 128}
_OPT: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,  # its embeddings are then projected in and out of the blocks
}
_FALCON: dict[str, Any] = {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_BLOOM: dict[str, Any] = {**_TOKENS, "hidden_size": 64, "n_layer": 3, "n_head": 4}
_EXPERTS: dict[str, Any] = {**_HEAD_DIM, "num_experts_per_tok": 2}


def _config(kind: type[PretrainedConfig], defaults: dict[str, Any]) -> Callable[..., PretrainedConfig]:
    return lambda **overrides: kind(**{**defaults, **overrides})


ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": _config(LlamaConfig, _GROUPED),
    "qwen2": _config(Qwen2Config, _GROUPED),
    "qwen3": _config(Qwen3Config, _HEAD_DIM),
    "mistral": _config(MistralConfig, _SLIDING),
    "gemma2": _config(Gemma2Config, _SLIDING),
    "gemma3": _config(Gemma3TextConfig, _SLIDING),
    "phi3": _config(Phi3Config, _GROUPED),
    "gpt2": _config(GPT2Config, _GPT2),
    "opt": _config(OPTConfig, _OPT),
    "gpt_neox": _config(GPTNeoXConfig, _ONE_HEAD_KIND),
    "gemma": _config(GemmaConfig, _HEAD_DIM),
    "phi": _config(PhiConfig, _GROUPED),
    "falcon": _config(FalconConfig, _FALCON),
    "bloom": _config(BloomConfig, _BLOOM),
    "olmo2": _config(Olmo2Config, _GROUPED),
}
"""{name: function(**overrides) -> config}. Hidden size 64, 3 blocks, 4 heads, 300 tokens, 128 positions."""

MOE: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": _config(MixtralConfig, {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": _config(Qwen3MoeConfig, {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}),
}
"""The same for models with experts."""


def make_checkpoint(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a random model as safetensors in `folder` and return the folder.

    tied: whether head and embeddings share their weight; None leaves it to the architecture. max_shard_size: as in
    save_pretrained ("100KB" gives several shards). overrides: arguments of the config. Every parameter is random, also
    the biases and norms that a fresh model sets to 0 or 1, so that dropping one shows in the logits.
    """
    if tied is not None:
        overrides["tie_word_embeddings"] = tied
    config = (ARCHITECTURES | MOE)[name](**overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
