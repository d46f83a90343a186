"""Loading and saving through transformers: the quantizer that it finds under `"quant_method": "llmquant"`.

    "quantization_config": {
        "quant_method": "llmquant",
        "version": "0.1.0",
        "formats": {"int4:g128:bf16": ["model.layers.0.self_attn.q_proj", ...], "int8:channel:bf16": [...]}
    }

`formats` says which modules are quantized and how, by their names in the model; every other module is dense. Nothing
of a folder is taken on trust: what is missing, misshapen or not finite raises and is named, where transformers alone
would go on with random numbers.
"""

from __future__ import annotations

import copy
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmquant import formats as registry
from llmquant import inspection
from llmquant.checkpoint import DTYPES, Checkpoint, check_config, locate
from llmquant.errors import CheckpointError, LlmquantError, PlanError, VerificationError
from llmquant.experts import layouts, packed_name
from llmquant.formats import Format, TensorSpec
from llmquant.linear import QuantConv, QuantEmbedding, QuantExperts, QuantLinear, QuantModule
from llmquant.matrices import CONVOLUTIONS, loader_of, target_of, text_config
from llmquant.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "llmquant"
REMEDY = "the checkpoint is damaged or incomplete: copy it again, or quantize the model again"

# transformers 5.17 does not cast what it renames or merges while loading: a model without its head, experts.
RENAMED_STAYS_UNCAST = not hasattr(HfQuantizer, "get_new_dtype")

Specs = dict[str, TensorSpec]


class LlmquantConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json. Keys that this version does not know are kept and saved again."""

    def __init__(self, formats: dict[str, list[str]] | None = None, version: str = __version__, **unknown: Any) -> None:
        """formats: {spec: names of the modules stored so}; version: of the llmquant that wrote the folder.

        Raises CheckpointError where `formats` is malformed, PlanError for a format that this version does not know.
        """
        self.quant_method = METHOD
        self.version = version
        self.formats = formats
        self.unknown = {key: value for key, value in unknown.items() if key != "quant_method"}
        self.modules()

    def modules(self) -> dict[str, Format]:
        """{name of a module: its format}."""
        return registry.listed_modules(self.formats)

    def to_dict(self) -> dict[str, Any]:
        known = {"quant_method": self.quant_method, "version": self.version, "formats": self.formats}
        return copy.deepcopy({**self.unknown, **known})


class LlmquantQuantizer(HfQuantizer):
    """What transformers calls around loading. It overrides no more than this: the rest differs between versions."""

    requires_calibration = True  # transformers then refuses to quantize a dense model through this class

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """On the empty skeleton: swap the listed modules, and compare what they expect with the files' headers."""
        swap(model, self.quantization_config.modules())
        for layer in quantized_layers(model).values():
            layer.filling = True
        self._stored = read_headers(checkpoint_files or [])
        self._expected = {name: _spec(tensor) for name, tensor in model.state_dict().items()}
        for name in _quantized_tensors(model):
            if (stored := _find(model, name, self._stored)) is not None:
                _check_spec(name, stored, self._expected[name])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Raises VerificationError unless all of the model came from the files, and is what belongs there."""
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise PlanError("quantized layers cannot be split over devices by tensor parallelism here: serve with vLLM")
        for layer in quantized_layers(model).values():
            layer.filling = False
        settle_types(model, self._expected, self._stored)
        verify(model, self._expected, self._stored)
        del self._expected, self._stored

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters over it are: gradients flow through the layers, never to codes


def register() -> None:
    """Make transformers load what llmquant writes. It may be called more than once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LlmquantConfig)
        register_quantizer(METHOD)(LlmquantQuantizer)
        ALL_EXPERTS_FUNCTIONS.register(METHOD, experts_together)


def load(
    model: str | os.PathLike[str], *, verify: bool = False, keep_decoded: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The quantized model in a folder, or of a hub id, in eval mode: llmquant's, or one of compressed-tensors.

    No code that comes with it is run.

    Its class is the one that config.json names. verify: first hash every file, and decode every matrix. keep_decoded:
    hold every weight decoded, too, as it is first used: the memory of the original for its speed on long prompts.
    kwargs: as from_pretrained takes them, such as device_map and dtype.
    Raises CheckpointError where there is no llmquant model, or one that transformers cannot build; VerificationError
    where the model is incomplete, or is not what was written.

    Examples:
        >>> facts = llmquant.quantize(MODEL, OUTPUT / "q", format="int4:g64", quality="fast")
        >>> model = llmquant.load(OUTPUT / "q", verify=True)
        >>> len(llmquant.explain(model))
        42
    """
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(model, **kwargs)
    except Exception as error:  # whatever transformers makes of what is no config
        raise CheckpointError(f"{model}: no model here: {error}") from error
    if not isinstance(config, dict) or not config:
        raise CheckpointError(f"{model}: no model here: it has no config.json")
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in (METHOD, "compressed-tensors"):
        found = f"its quant_method is {method}" if method else "it is not quantized"
        if method == "gptq":
            raise CheckpointError(f"{model}: GPTQ's files are loaded after `llmquant convert`, which keeps every value")
        raise CheckpointError(f"{model}: {found}: load it with transformers, or quantize it with llmquant first")
    if verify and (problems := inspection.verify(locate(str(model)))):
        raise VerificationError(f"{model}: {problems[0]}: {REMEDY}")
    # Without offload_buffers a layer mapped to the CPU or the disk would keep its quantized weight on the GPU.
    kwargs = {"use_safetensors": True, "offload_buffers": True, "trust_remote_code": False, **kwargs}
    sizes: list[int] = []
    if Path(model).is_dir():  # what transformers would take on trust
        files = Checkpoint(Path(model))
        sizes = [math.prod(files.shape(name)) for name in files.names()]
    check_config(config, Path(model), sizes)
    try:
        if method != METHOD:
            kwargs["config"] = _in_our_words(model, kwargs["trust_remote_code"])
        loaded: PreTrainedModel = loader_of(config).from_pretrained(model, **kwargs)
        for layer in quantized_layers(loaded).values():
            layer.keep_decoded = keep_decoded
        return loaded
    except (LlmquantError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a config, or a request, that makes no sense leads to
        raise CheckpointError(f"{model}: transformers cannot load it: {type(error).__name__}: {error}") from error


def _in_our_words(model: str | os.PathLike[str], trust_remote_code: bool) -> Any:
    """The config of a folder of compressed-tensors, whose bytes are those of our formats, as llmquant writes it."""
    from transformers import AutoConfig

    from llmquant.exchange import foreign

    folder = locate(str(model))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.quantization_config = foreign.quantization_config(foreign.read(Checkpoint(folder))[1])
    return config


def explain(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """{name of each quantized module: which kernel serves it and why}. dtype: of the inputs, by default the model's."""
    inputs = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: layer.explain(inputs) for name, layer in quantized_layers(model).items()}


def quantized_layers(model: nn.Module) -> dict[str, QuantModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}


def _quantized_tensors(model: nn.Module) -> list[str]:
    return [
        f"{name}.{suffix}" for name, layer in quantized_layers(model).items() for suffix, _ in layer.named_buffers()
    ]


# ---- before loading


def swap(model: Any, modules: dict[str, Format]) -> None:
    """Put an empty QuantLinear or QuantConv in place of each of these modules of a model on meta.

    Raises CheckpointError, naming the module, where the model lacks it or it holds no matrix.
    """
    present = dict(model.named_modules())
    tied = {name for pair in _tied(model).items() for name in pair}
    parameters = {name for name, value in model.named_parameters() if value.ndim == 3}
    found = layouts(model, getattr(text_config(model.config), "hidden_size", 0)) if parameters else {}
    if found:
        model.set_experts_implementation(METHOD)
    for listed, fmt in modules.items():
        name = next((name for name in _aliases(model, listed) if name in present or name in parameters), None)
        if name is None:
            if model.base_model is model and not listed.startswith(f"{model.base_model_prefix}."):
                continue  # of a head that this model was asked to go without
            raise CheckpointError(f"config.json: {listed} is quantized, but {type(model).__name__} has no such module")
        if f"{name}.weight" in tied:
            raise CheckpointError(
                f"config.json: {listed} is listed as {fmt.spec}, but the model shares its weight with another layer: "
                'set "tie_word_embeddings" to false'
            )
        try:
            if name in parameters:
                _swap_experts(model, name, fmt, found.get(name))
            else:
                model.set_submodule(name, _counterpart(present[name], fmt))
        except PlanError as error:
            raise CheckpointError(f"config.json: {listed} cannot be {fmt.spec}: {error}") from error


def _swap_experts(model: Any, name: str, fmt: Format, transposed: bool | None) -> None:
    """Put empty QuantExperts in place of a parameter of a model on meta. Raises PlanError where it holds no experts."""
    holder, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if transposed is None:
        raise PlanError(f"{type(holder).__name__} does not multiply by it as by a matrix for each expert")
    parameter = holder.get_parameter(leaf)
    with torch.device("meta"):
        experts = QuantExperts(fmt, tuple(parameter.shape), transposed=transposed, dtype=parameter.dtype)
    del holder._parameters[leaf]
    holder.add_module(packed_name(leaf), experts)
    holder.__dict__[leaf] = experts  # under its own name for the forward pass, but not for what is saved and loaded


def experts_together(module: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """What transformers runs for the experts of a model: all at once where a kernel does that, else the model's own.

    module: with experts as transformers' `use_experts_implementation` declares them. x (tokens, size); chosen and
    shares (tokens, chosen experts): which, and what their outputs are multiplied by before they are added.
    """
    held = [part for part in module.children() if isinstance(part, QuantExperts)]
    dense = any(value.ndim == 3 for value in module.parameters(recurse=False))
    derived = torch.is_grad_enabled() and x.requires_grad  # the kernels have no derivative
    if not held or dense or derived or any(part.alone(x.dtype) is not None for part in held):
        return type(module).forward.__wrapped__(module, x, chosen, shares)
    experts, order = chosen.flatten().sort()
    ends = torch.searchsorted(experts, torch.arange(len(held[0]), device=x.device), right=True, out_int32=True)

    def product(name: str, inputs: Tensor) -> Tensor:
        y = getattr(module, name).together(inputs, ends)
        return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y

    y = product("gate_up_proj" if module.has_gate else "up_proj", x[order // chosen.shape[1]])
    y = product("down_proj", module._apply_gate(y) if module.has_gate else module.act_fn(y))
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = torch.zeros_like(y).index_copy(0, order, y * shares.flatten()[order].unsqueeze(1))
    return y.view(*chosen.shape, -1).sum(1).to(x.dtype)


def _counterpart(old: nn.Module, fmt: Format) -> QuantModule:
    """Raises PlanError where there is none."""
    if isinstance(old, nn.Embedding):
        with torch.device("meta"):
            return QuantEmbedding(fmt, old)
    target = target_of("", old)
    if target is None:
        raise PlanError(f"it is a {type(old).__name__}, no linear layer and no plain convolution")
    outputs, inputs = target.shape
    with torch.device("meta"):
        if isinstance(old, CONVOLUTIONS):
            return QuantConv(fmt, old)
        return QuantLinear(fmt, inputs, outputs, bias=target.bias, dtype=old.get_parameter("weight").dtype)


def _aliases(model: Any, name: str) -> tuple[str, str, str]:
    """A model without its head has the names of the model with a head, less a prefix; either may load the other's."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def _tied(model: Any) -> dict[str, str]:
    """{tensor: the tensor it shares its values with}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def read_headers(files: list[str]) -> Specs:
    """{tensor: shape and type} of safetensors files. Raises CheckpointError for any other file, or a damaged one."""
    stored: Specs = {}
    for file in files:
        if ".." in Path(file).parts:
            raise CheckpointError(f"{file}: lies outside the model's folder")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file}: not safetensors: llmquant models are, and nothing else is read")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    piece = tensors.get_slice(name)
                    if piece.get_dtype() not in DTYPES:
                        raise CheckpointError(f"{file}: {name} has the unknown type {piece.get_dtype()}")
                    stored[name] = TensorSpec(tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or not safetensors ({error}): copy this file again") from error
    return stored


def _find(model: Any, name: str, stored: Specs) -> TensorSpec | None:
    """What the files say of a tensor of the model; None also where transformers renames it while loading."""
    return next((stored[alias] for alias in _aliases(model, name) if alias in stored), None)


def _check_spec(name: str, found: TensorSpec, expected: TensorSpec) -> None:
    if found != expected:
        raise VerificationError(
            f"{name} is {found.dtype} {list(found.shape)}, but should be {expected.dtype} {list(expected.shape)}: "
            f"{REMEDY}"
        )


# ---- after loading


def settle_types(model: Any, expected: Specs, stored: Specs) -> None:
    """Give each tensor in memory the type that the skeleton had, where transformers casts too much or too little."""
    quantized = _quantized_tensors(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = expected[name].dtype
        if tensor.is_meta or tensor.dtype == wanted or not tensor.is_floating_point():
            continue
        if name in quantized:
            # Layers that a model keeps in float32 are cast with their scales: exactly, so it can be undone.
            undo = tensor.dtype == torch.float32 and _find(model, name, stored) == expected[name]
        else:
            undo = RENAMED_STAYS_UNCAST and bool(stored) and name not in stored
        if undo:
            tensor.data = tensor.data.to(wanted)


def verify(model: Any, expected: Specs, stored: Specs) -> None:
    """Compare a loaded model with what its empty skeleton expected and what the files held.

    Raises VerificationError, naming the tensor: one missing from the files, of another shape or type, or not finite.
    """
    tensors, quantized = model.state_dict(keep_vars=True), _quantized_tensors(model)
    missing = [name for name, tensor in tensors.items() if not _was_read(model, name, tensor, stored)]
    for pattern in model._keys_to_ignore_on_load_missing or ():
        missing = [name for name in missing if name in quantized or not re.search(pattern, name)]
    if missing:
        where = model.name_or_path if stored else "the tensors given"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise VerificationError(f"{missing[0]}{more}: not found in {where}: {REMEDY}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name].shape:
            _check_spec(name, _spec(tensor), expected[name])
    for name, layer in quantized_layers(model).items():
        _verify_layer(name, layer)


def _was_read(model: Any, name: str, tensor: Tensor, stored: Specs) -> bool:
    """Whether transformers found values for this tensor in the files."""
    if not tensor.is_meta:
        return getattr(tensor, "_is_hf_initialized", False)
    # Offloaded: the values lie elsewhere, and so does the mark. What the files hold under its names must do.
    tied = _tied(model)
    names = [name, *(target for target, source in tied.items() if source == name)]
    names += [tied[name]] if name in tied else []
    return any(_find(model, n, stored) is not None for n in names) or bool(getattr(model, "_weight_conversions", None))


def _verify_layer(name: str, layer: QuantModule) -> None:
    """The buffers in memory (an offloaded one is out of sight): types, the shape that was noted, finite scales."""
    for suffix, one in layer.format.layout(layer.matrix_shape).items():
        stacked = isinstance(layer, QuantExperts)
        spec = TensorSpec((len(layer), *one.shape), one.dtype) if stacked else one
        buffer = layer._buffers[suffix]  # not get_buffer: it would find what stands for the dense weight
        if buffer is None or buffer.is_meta:
            continue
        _check_spec(f"{name}.{suffix}", _spec(buffer), spec)
        if suffix == "weight_shape" and (buffer.cpu() != torch.tensor(layer.matrix_shape)).any():
            raise VerificationError(
                f"{name}.{suffix} says {buffer.tolist()}, but the layer is {list(layer.matrix_shape)} (out, in): "
                f"{REMEDY}"
            )
        if spec.dtype.is_floating_point and not torch.isfinite(buffer.float()).all():
            raise VerificationError(f"{name}.{suffix} holds values that are not finite: {REMEDY}")


register()
