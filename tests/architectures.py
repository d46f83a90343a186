"""Tiny random models of many architectures, for every test that needs one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BloomConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeepseekV3Config,
    DetrConfig,
    DetrForObjectDetection,
    FalconConfig,
    FunnelConfig,
    FunnelForMaskedLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MixtralConfig,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    NemotronHConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    SwinConfig,
    SwinForImageClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
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
_DEEPSEEK: dict[str, Any] = {
    **_ONE_HEAD_KIND,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
_QWEN3_NEXT: dict[str, Any] = {
    **_EXPERTS,
    "num_hidden_layers": 4,  # the fourth has full attention
    "num_experts": 4,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_NEMOTRON: dict[str, Any] = {
    **{key: value for key, value in _EXPERTS.items() if key != "num_hidden_layers"},
    "layers_block_type": ["moe", "attention", "moe"],
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
    "n_group": 1,
    "topk_group": 1,
}


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
    "qwen3_moe": _config(Qwen3MoeConfig, {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 48}),
    "qwen2_moe": _config(
        Qwen2MoeConfig,
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    ),
    "gpt_oss": _config(GptOssConfig, {**_EXPERTS, "num_local_experts": 4, "sliding_window": 8}),
    "deepseek_v3": _config(DeepseekV3Config, _DEEPSEEK),
    "qwen3_next": _config(Qwen3NextConfig, _QWEN3_NEXT),
    "llama4": _config(Llama4TextConfig, {**_EXPERTS, "num_local_experts": 4, "intermediate_size_mlp": 128}),
    "nemotron_h": _config(NemotronHConfig, _NEMOTRON),
}
"""The same for models with experts, 4 of which 2 are chosen."""


_EYES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

SEEING: dict[str, Callable[..., PretrainedConfig]] = {
    "llava": lambda **overrides: LlavaConfig(
        vision_config=CLIPVisionConfig(**_EYES), text_config=LlamaConfig(**_GROUPED), image_token_id=5, **overrides
    ),
    "gemma3_vision": lambda **overrides: Gemma3Config(
        vision_config=SiglipVisionConfig(**_EYES),
        text_config=Gemma3TextConfig(**_SLIDING),
        mm_tokens_per_image=4,
        image_token_id=5,
        **overrides,
    ),
    "qwen2_5_vl": lambda **overrides: Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config={**_GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=5,
        **overrides,
    ),
}
"""The same for models that read images too; the language part has the sizes of the others."""


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
    config = (ARCHITECTURES | MOE | SEEING)[name](**overrides)
    auto = AutoModelForImageTextToText if name in SEEING else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Make every parameter random, and the statistics of batch norms too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * math.prod(parameter.shape[1:]) ** -0.5)
        else:
            parameter.add_(0.1 * noise)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)


# ---- models that are no causal language models


@dataclass(frozen=True)
class Family:
    """A tiny model of another kind: its class, the Auto class that users load it with, and what it takes.

    quantized: how many matrices a format for everything quantizes; some: a few of them; dense: some that stay dense.
    """

    model: type[PreTrainedModel]
    auto: Any
    config: Callable[[], PretrainedConfig]
    inputs: Callable[[], dict[str, Tensor]]
    quantized: int
    some: tuple[str, ...]
    dense: tuple[str, ...]

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """All floating tensors that the model gives for the inputs."""
        with torch.no_grad():
            found = model(**self.inputs()).to_tuple()
        return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 32, 32)}


def _texts() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": _text()["input_ids"][:, :5]}


def _speech() -> dict[str, Tensor]:
    return {"input_features": _random(2, 16, 60), "decoder_input_ids": _text()["input_ids"][:, :5]}


_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_PATCHES: dict[str, Any] = {**_TOWER, "image_size": 32, "patch_size": 8}
_BOTH: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
_WHISPER: dict[str, Any] = {
    **_TOKENS,
    **_BOTH,
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "max_target_positions": 20,
    "decoder_start_token_id": 1,
}
_T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
_WAV2VEC2: dict[str, Any] = {
    **_TOWER,
    "vocab_size": 30,
    "conv_dim": [48, 48, 48],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        BertForMaskedLM,
        AutoModelForMaskedLM,
        lambda: BertConfig(vocab_size=VOCABULARY, **_TOWER),
        _text,
        quantized=12,
        some=("bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense"),
        dense=("cls.predictions.transform.dense",),
    ),
    "bert alone": Family(
        BertModel,
        AutoModel,
        lambda: BertConfig(vocab_size=VOCABULARY, **_TOWER),
        _text,
        quantized=12,
        some=("encoder.layer.1.attention.self.query",),
        dense=("pooler.dense",),
    ),
    "albert": Family(  # one block, whose weights are used for every layer
        AlbertForMaskedLM,
        AutoModelForMaskedLM,
        lambda: AlbertConfig(vocab_size=VOCABULARY, embedding_size=32, **_TOWER),
        _text,
        quantized=6,
        some=("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",),
        dense=("albert.encoder.embedding_hidden_mapping_in", "predictions.dense"),
    ),
    "t5": Family(  # it reads the type of a weight
        T5ForConditionalGeneration,
        AutoModelForSeq2SeqLM,
        lambda: T5Config(**_T5),
        _texts,
        quantized=2 * 6 + 2 * 10,
        some=("encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.0.layer.1.EncDecAttention.k"),
        dense=("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    ),
    "marian": Family(  # it computes its positions, and stores none
        MarianMTModel,
        AutoModelForSeq2SeqLM,
        lambda: MarianConfig(**_TOKENS, **_BOTH, decoder_start_token_id=1, max_position_embeddings=32),
        _texts,
        quantized=2 * 6 + 2 * 10,
        some=("model.encoder.layers.0.self_attn.out_proj", "model.decoder.layers.1.encoder_attn.q_proj"),
        dense=(),
    ),
    "funnel": Family(  # blocks of blocks; it looks at the shapes of weights when it is built
        FunnelForMaskedLM,
        AutoModelForMaskedLM,
        lambda: FunnelConfig(
            vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=64, n_head=4, d_head=16, d_inner=96, num_decoder_layers=1
        ),
        _text,
        quantized=3 * 6,
        some=("funnel.encoder.blocks.1.0.attention.q_head", "funnel.decoder.layers.0.ffn.linear_2"),
        dense=("funnel.encoder.blocks.0.0.attention.r_kernel",),
    ),
    "switch": Family(  # experts under names of their own, and a router
        SwitchTransformersForConditionalGeneration,
        AutoModelForSeq2SeqLM,
        lambda: SwitchTransformersConfig(
            **_T5, num_decoder_layers=2, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        ),
        _texts,
        quantized=2 * 4 + 2 * 8 + 2 * 2 + 2 * 4 * 2,
        some=("encoder.block.1.layer.1.mlp.experts.expert_3.wi",),
        dense=(),
    ),
    "vit": Family(
        ViTForImageClassification,
        AutoModelForImageClassification,
        lambda: ViTConfig(num_labels=5, **_PATCHES),
        _image,
        quantized=12,
        some=("vit.layers.1.mlp.fc2",),
        dense=("vit.embeddings.patch_embeddings.projection", "classifier"),
    ),
    "swin": Family(
        SwinForImageClassification,
        AutoModelForImageClassification,
        lambda: SwinConfig(
            image_size=32, patch_size=4, embed_dim=48, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5
        ),
        _image,
        quantized=13,
        some=("swin.encoder.layers.0.downsample.reduction",),
        dense=("swin.embeddings.patch_embeddings.projection", "classifier"),
    ),
    "clip": Family(  # two towers
        CLIPModel,
        AutoModel,
        lambda: CLIPConfig(
            text_config={**_TOKENS, **_TOWER, "max_position_embeddings": 16}, vision_config=_PATCHES, projection_dim=48
        ),
        lambda: {**_text(), **_image()},
        quantized=24,
        some=("text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.1.self_attn.q_proj"),
        dense=("vision_model.embeddings.patch_embedding", "visual_projection", "text_projection"),
    ),
    "whisper": Family(
        WhisperForConditionalGeneration,
        AutoModelForSpeechSeq2Seq,
        lambda: WhisperConfig(**_WHISPER, suppress_tokens=None, begin_suppress_tokens=None),
        _speech,
        quantized=2 * 6 + 2 * 10,
        some=("model.encoder.layers.1.fc1", "model.decoder.layers.0.encoder_attn.v_proj"),
        dense=("model.encoder.conv1", "model.encoder.conv2"),
    ),
    "wav2vec2": Family(  # the convolution that embeds positions is made of two tensors
        Wav2Vec2ForCTC,
        AutoModelForCTC,
        lambda: Wav2Vec2Config(**_WAV2VEC2),
        lambda: {"input_values": _random(2, 1200)},
        quantized=2 + 12,
        some=("wav2vec2.feature_extractor.conv_layers.1.conv", "wav2vec2.encoder.layers.0.attention.out_proj"),
        dense=("wav2vec2.feature_extractor.conv_layers.0.conv", "wav2vec2.feature_projection.projection", "lm_head"),
    ),
    "resnet": Family(
        ResNetForImageClassification,
        AutoModelForImageClassification,
        lambda: ResNetConfig(embedding_size=32, hidden_sizes=[32, 48], depths=[1, 2], layer_type="basic", num_labels=5),
        _image,
        quantized=2 + 5,
        some=("resnet.encoder.stages.1.layers.0.shortcut.convolution",),
        dense=("resnet.embedder.embedder.convolution", "classifier.1"),
    ),
    "convnext": Family(
        ConvNextForImageClassification,
        AutoModelForImageClassification,
        lambda: ConvNextConfig(hidden_sizes=[32, 48], depths=[1, 2], num_stages=2, num_labels=5),
        _image,
        quantized=3 * 3 + 1,  # rows of 49 in the depthwise ones
        some=("convnext.encoder.stages.1.downsampling_layer.1", "convnext.encoder.stages.0.layers.0.dwconv"),
        dense=("convnext.embeddings.patch_embeddings", "classifier"),
    ),
    "mobilenet": Family(
        MobileNetV2ForImageClassification,
        AutoModelForImageClassification,
        lambda: MobileNetV2Config(num_labels=5, depth_multiplier=0.35),
        _image,
        quantized=22,
        some=("mobilenet_v2.layer.15.reduce_1x1.convolution",),
        dense=("mobilenet_v2.layer.3.conv_3x3.convolution", "classifier"),  # rows of 9
    ),
    "detr": Family(  # a convolutional network in a transformer
        DetrForObjectDetection,
        AutoModelForObjectDetection,
        lambda: DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=ResNetConfig(
                embedding_size=32, hidden_sizes=[32, 48], depths=[1, 1], layer_type="basic", out_features=["stage2"]
            ),
            num_queries=5,
            **{**_BOTH, "encoder_layers": 1, "decoder_layers": 1},
        ),
        _image,
        quantized=2 + 3 + 6 + 10,
        some=("model.encoder.layers.0.self_attn.o_proj",),
        dense=("model.input_projection", "class_labels_classifier"),
    ),
}


def make_family(folder: Path, name: str, seed: int = 0) -> Path:
    """Save a random model of a family as safetensors in `folder` and return the folder."""
    family = FAMILIES[name]
    model = family.model(family.config()).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder
