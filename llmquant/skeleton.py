"""What a checkpoint is a model of, before any of its tensors is read: its config, and the model without data."""

from __future__ import annotations

import math

import torch
import transformers
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from llmquant.checkpoint import TensorSource, check_config, read_json
from llmquant.errors import CheckpointError, PlanError
from llmquant.matrices import class_named, text_config
from llmquant_kernels.cpu_compiled import multiplies_bfloat16


def read_config(checkpoint: TensorSource, trust_remote_code: bool, decoded: bool) -> PretrainedConfig:
    """The config of a model that is not quantized yet, or whose tensors are decoded when they are read."""
    folder = checkpoint.folder
    stored = read_json(folder / "config.json")
    check_config(stored, folder, [math.prod(checkpoint.shape(name)) for name in checkpoint.names()])
    name = stored.get("model_type")
    own_code = "auto_map" in stored
    if name not in CONFIG_MAPPING and not (own_code and trust_remote_code):
        advice = "it brings its own code: allow remote code if you trust it" if own_code else "upgrade transformers"
        raise PlanError(f"{folder}: transformers {transformers.__version__} does not know {name!r} models; {advice}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the config class raises, the file is at fault
        raise CheckpointError(f"{folder}: config.json is no valid {name!r} config: {error}") from error
    if (quantization := stored.get("quantization_config")) is not None and decoded:
        del config.quantization_config
    elif quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise PlanError(f"{folder} is quantized already ({method}); start from the original checkpoint")
    return config


def is_causal(config: PretrainedConfig) -> bool:
    """Whether it is a causal language model, or has one as a part: so is the class that the config names, or none is
    named, or it is unknown here.

    Raises PlanError where no class is named and the kind of model has others.
    """
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    causal = not encoder and not getattr(config, "is_encoder_decoder", False)
    named = class_named(config.architectures)
    if named is not None:
        own = named.__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        return causal and (own or _has_language_part(named, config))
    if not causal:
        raise PlanError(
            f"{config.model_type!r} is not a causal language model, and config.json does not say what it is: name its "
            'class in "architectures"'
        )
    return True


def _has_language_part(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether a model writes text after what else it reads: images, say. Its blocks are those of its language part."""
    text = text_config(config)
    return text is not config and kind.can_generate() and not getattr(text, "is_encoder_decoder", False)


def skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model without data: parameters on the meta device, computed buffers real."""
    # The attention implementation is left to the model: forcing one changes the results of some.
    named = class_named(config.architectures)
    try:
        with init_empty_weights(include_buffers=False):
            if named is None:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            else:
                model = named._from_config(config, dtype=dtype)
    except Exception as error:  # of a config that its class takes and the model does not
        kind = "causal language model" if named is None else named.__name__
        raise PlanError(f"no {kind} can be built for {config.model_type!r}: {error}") from error
    return model.eval()


def stored_dtype(checkpoint: TensorSource, config: PretrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{checkpoint.folder}: config.json: {dtype} is no type that a model computes in")
    if dtype is not None:
        return dtype
    for name in checkpoint.names():
        if checkpoint.dtype(name).is_floating_point:
            return checkpoint.dtype(name)
    raise CheckpointError(f"{checkpoint.folder} holds no floating tensor")


def fast_dtype(device: str, own: torch.dtype) -> torch.dtype | None:
    """float32 on a CPU that is slow in the model's own type, no choice (None) elsewhere.

    Without instructions for it a forward pass in bfloat16 takes some five times as long, and with it a calibrated run
    three times. In float16 the products of a backward pass take two hundred times as long.
    """
    if not device.startswith("cpu"):
        return None
    slow = own == torch.float16 or (own == torch.bfloat16 and not multiplies_bfloat16())
    return torch.float32 if slow else None
