"""Adapters over a frozen quantized model: LoRA by the peft package, whose gradients flow through the quantized layers.

    config = llmquant.adapters.over_quantized(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(prepare_model_for_kbit_training(llmquant.load(FOLDER)), config)

and to load what was trained: `PeftModel.from_pretrained(llmquant.load(FOLDER), ADAPTER, config=config)`.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from llmquant.errors import PlanError
from llmquant.exchange.extras import extra
from llmquant.linear import QuantLinear


def over_quantized(config: Any) -> Any:
    """The LoraConfig, made to take our layers, too. Raises PlanError where peft is not installed."""
    layer = _layer()
    config._register_custom_module({QuantLinear: layer})
    return config


@cache
def _layer() -> type:
    base: Any = extra("peft.tuners.lora").Linear

    class LoraQuantLinear(base):
        """peft's own layer over a QuantLinear: x W^T + bias from the packed weight, and the adapters' products."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():  # that it does not know the kind of layer, which is why this class exists
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                super().__init__(*args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise PlanError(
                "an adapter cannot be merged into codes: export the model with `llmquant export --to dense`, merge "
                "there, and quantize the result again; or keep the adapter beside the model"
            )

    return LoraQuantLinear
