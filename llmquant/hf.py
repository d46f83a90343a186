"""Loading and saving through transformers: the quantizer that it finds under `"quant_method": "llmquant"`.

    "quantization_config": {
        "quant_method": "llmquant",
        "version": "0.1.0",
        "formats": {"int4:g128:bf16": ["model.layers.0.self_attn.q_proj", ...], "int8:channel:bf16": [...]}
    }

`formats` says which modules are quantized and how, by their names in the model; every other module is dense. Loading
trusts nothing: whatever is missing, misshapen or not finite raises and is named, where transformers would go on with
random numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import llmquant
from llmquant import formats
from llmquant.errors import CheckpointError, LlmquantError, PlanError, VerificationError
from llmquant.formats import Format, TensorSpec
from llmquant.linear import QuantLinear

METHOD = "llmquant"
REMEDY = "the checkpoint is damaged or incomplete: copy it again, or quantize the model again"


class LlmquantConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json. Keys that this version does not know are kept and saved again."""

    def __init__(self, formats: dict[str, list[str]] | None = None, version: str = "", **unknown: Any) -> None:
        """formats: {spec: names of the modules stored so}; version: of the llmquant that wrote the folder.

        Raises CheckpointError where `formats` is malformed, PlanError for a format that this version does not know.
        """
        self.quant_method = METHOD
        self.version = version or llmquant.__version__
        self.formats = formats or {}
        self.unknown = {key: value for key, value in unknown.items() if key != "quant_method"}
        self.modules()

    def modules(self) -> dict[str, Format]:
        """{name of a module: its format}."""
        found: dict[str, Format] = {}
        if not isinstance(self.formats, dict):
            raise CheckpointError('config.json: "formats" must map each format to a list of modules')
        for spec, names in self.formats.items():
            fmt = formats.get(spec)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f'config.json: "formats" must give {spec} a list of module names')
            for name in names:
                if name in found:
                    raise CheckpointError(f"config.json: {name} is listed twice, as {found[name].spec} and as {spec}")
                found[name] = fmt
        return found

    def to_dict(self) -> dict[str, Any]:
        known = {"quant_method": self.quant_method, "version": self.version, "formats": self.formats}
        return copy.deepcopy({**self.unknown, **known})
