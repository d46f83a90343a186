"""The Python interface: what the commands do, as functions."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

import llmquant.hf  # noqa: F401  (registers the loader)
from llmquant import metrics, pipeline, text
from llmquant.activations import Activations, rounded
from llmquant.checkpoint import Checkpoint, locate
from llmquant.description import describe
from llmquant.errors import PlanError
from llmquant.job import Budget
from llmquant.matrices import loader_of
from llmquant.recipe import QUALITIES, Quality, Recipe

OBSERVED = 16  # windows of text on which the range of static activations is found


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    format: str | Recipe = "int4:g128",
    budget: Budget | None = None,
    quality: str = "balanced",
    solver: str = "auto",
    rotate: str = "none",
    calibration: str | None = None,
    calibration_check: bool = True,
    samples: int | None = None,
    length: int | None = None,
    batch: int = 8,
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload: str | Path | None = None,
    max_memory: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
    report: bool = True,
    trust_remote_code: bool = False,
    progress: pipeline.Progress = pipeline.silent,
) -> dict[str, Any]:
    """Quantize a model into a folder that `llmquant.load` loads. Returns what the folder's llmquant.json says.

    model: a folder with config.json and safetensors, or a hub id; format: the name of one, or a Recipe; budget: have
    the format of every matrix chosen instead, but for what rules before a recipe's last one say; quality: fast,
    balanced or best; solver: a method by name instead, for a format by name; rotate: none, value, residual, or auto,
    which tries them; calibration: "self" (the model's own samples), a file or a dataset id; calibration_check: whether
    half of it gives way to the model's own samples where it is not the kind of text that the model was made for;
    samples, length: windows and tokens a window; device: by default cuda where there is one; dtype: to calibrate in, by
    default the model's own, or float32 on a CPU that is slow in that; offload: a folder for hidden states;
    max_memory: bytes, beyond which the plan is refused; verify: compare the result with the original before it gets its
    name; report: whether README.md and report.html are written; progress(what, done, total) is called now and then.

    A run that was cut is taken up again by the same call. Raises the LlmquantError that says what is wrong, before any
    work wherever that can be known.

    Examples:
        >>> facts = llmquant.quantize(MODEL, OUTPUT / "int4", format="int4:g64", quality="fast")
        >>> facts["bits_per_weight"], len(facts["tensors"])
        (4.2542..., 42)

        A recipe has rules by name, of which the first that matches counts:

        >>> rules = [llmquant.Rule("*.down_proj", "int8:g128"), llmquant.Rule("*", "int4:g128")]
        >>> facts = llmquant.quantize(MODEL, OUTPUT / "mixed", format=llmquant.Recipe(tuple(rules)), quality="fast")
        >>> sorted({tensor["format"] for tensor in facts["tensors"]})
        ['int4:g128:bf16', 'int8:g128:bf16']
    """
    if isinstance(format, Recipe) and solver != "auto":
        raise PlanError(f"solver {solver!r} beside a recipe: its rules name the solvers")
    job = job_for(
        str(model),
        format if isinstance(format, Recipe) else Recipe.uniform(format, solver=solver),
        quality=quality,
        calibration=calibration,
        calibration_check=calibration_check,
        samples=samples,
        length=length,
        batch=batch,
        seed=seed,
        device=device,
        dtype=dtype,
        rotate=rotate,
        budget=budget,
        trust_remote_code=trust_remote_code,
    )
    prepared = pipeline.prepare(
        job,
        Path(output),
        overwrite=overwrite,
        offload=None if offload is None else Path(offload),
        max_memory=max_memory,
        progress=progress,
    )
    manifest = pipeline.quantize(prepared, Path(output), overwrite=overwrite, verify=verify, progress=progress)
    if report and prepared.ranks.first:
        describe(Path(output))
    return manifest


def export(source: str | Path, output: str | Path, to: str, *, overwrite: bool = False) -> list[str]:
    """Write a quantized folder in the files of another tool, which that tool's own reader has checked.

    to: compressed-tensors, gptq, gguf or dense. Returns notes for the user. Raises PlanError, naming the tensor, for
    what the target cannot express.

    Examples:
        >>> llmquant.quantize(MODEL, OUTPUT / "mxfp4", format="mxfp4", quality="fast")["bits_per_weight"]
        4.25
        >>> llmquant.export(OUTPUT / "mxfp4", OUTPUT / "dense", "dense")
        []
    """
    from llmquant.exchange import export as exchange

    return exchange.export(Path(source), Path(output), to, overwrite=overwrite)


def convert(source: str | Path, output: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Turn a checkpoint of compressed-tensors or GPTQ into a folder that `llmquant.load` loads, value for value.

    source: a folder or a hub id. Returns what the folder's llmquant.json says. Raises PlanError, naming the module,
    for what no format here can hold.

    Examples:
        >>> facts = llmquant.quantize(MODEL, OUTPUT / "nvfp4", format="nvfp4", quality="fast")
        >>> notes = llmquant.export(OUTPUT / "nvfp4", OUTPUT / "for-vllm", "compressed-tensors")
        >>> llmquant.convert(OUTPUT / "for-vllm", OUTPUT / "back")["tensors"][0]["format"]
        'nvfp4'
    """
    from llmquant.exchange import convert as exchange

    return exchange.convert(str(source), Path(output), overwrite=overwrite)


def job_for(
    model: str,
    recipe: Recipe,
    *,
    quality: str,
    calibration: str | None,
    calibration_check: bool,
    samples: int | None,
    length: int | None,
    batch: int,
    seed: int,
    device: str | None,
    dtype: torch.dtype | None,
    rotate: str,
    budget: Budget | None,
    trust_remote_code: bool,
) -> pipeline.Job:
    """The words of a user as a job; torch's random numbers start at the seed. Raises PlanError for unknown quality."""
    if quality not in QUALITIES:
        raise PlanError(f"quality {quality!r} is unknown: choose one of {', '.join(QUALITIES)}")
    preset = QUALITIES[quality]
    shown = calibration_for(preset, calibration, calibration_check, samples, length, batch)
    torch.manual_seed(seed)
    device = device or default_device()
    return pipeline.Job(
        model,
        recipe.with_options(preset.options),
        shown,
        seed,
        device,
        dtype,
        tuning=preset.tuning,
        trust_remote_code=trust_remote_code,
        rotate=rotate,
        budget=budget,
    )


def calibration_for(
    preset: Quality, source: str | None, check: bool, samples: int | None, length: int | None, batch: int
) -> pipeline.Calibration | None:
    """What a preset shows to the model."""
    if not preset.calibrated and source is None:
        return None
    windows = samples or (128 if preset.calibrated else 16)
    return pipeline.Calibration(source or "self", windows, length, batch, curvature=preset.curvature, check=check)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(
    model: str | Path,
    source: str,
    *,
    reference: str | Path | None = None,
    protocol: str = "documents",
    window: int | None = None,
    max_windows: int | None = None,
    dtype: torch.dtype = torch.float32,
    activations: str | None = None,
    calibration: str | None = None,
    trust_remote_code: bool = False,
    progress: text.Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Perplexity of a model on a text and, with a reference, the KL divergence from it in nats.

    source: a text, JSON, JSONL or parquet file, or a dataset id; window: tokens a window, by default 2048 or the
    model's limit; max_windows: measure on the first ones only; dtype: of the activations; activations: round the inputs
    of quantized layers, as "int8:dynamic" or "int8:static:mse", the latter on the text of `calibration`.

    Examples:
        >>> TEXT.write_text(Path(llmquant.__file__).parent.joinpath("hf.py").read_text()) > 0
        True
        >>> found = llmquant.evaluate(MODEL, str(TEXT), reference=MODEL, max_windows=2)
        >>> found["kl_mean"], found["model"]["perplexity"] == found["reference"]["perplexity"]
        (0.0, True)
    """
    rounding = rounded_activations(str(model), activations, calibration, trust_remote_code)
    windows, vocabulary = evaluation_windows(str(model), source, protocol, window, max_windows, trust_remote_code)
    return measure(
        str(model),
        None if reference is None else str(reference),
        windows,
        vocabulary,
        dtype,
        trust_remote_code,
        progress,
        rounding,
    )


def evaluation_windows(
    model: str, source: str, protocol: str, window: int | None, max_windows: int | None, trust_remote_code: bool
) -> tuple[torch.Tensor, int]:
    """Tokens (windows, length) of a text, and how large the vocabulary really is."""
    folder = Checkpoint(locate(model)).folder
    tokenizer = text.load_tokenizer(folder, trust_remote_code)
    stream = text.token_stream(tokenizer, text.read_documents(source, tokenizer), protocol=protocol)
    length = text.window_length(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), window)
    return text.windows(stream, length)[:max_windows], text.vocabulary_size(tokenizer)


def measure(
    model: str,
    reference: str | None,
    windows: torch.Tensor,
    vocabulary: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
    progress: text.Progress,
    rounding: tuple[Activations, torch.Tensor | None] | None = None,
) -> dict[str, Any]:
    """As `evaluate`, on windows that are there. rounding: of activations, and the windows that a static one needs."""
    loaded = load_any(model, dtype, trust_remote_code)
    original = None if reference is None else load_any(reference, dtype, trust_remote_code)
    with nullcontext(0) if rounding is None else rounded(loaded, *rounding) as layers:
        if original is None:
            found = metrics.perplexity(loaded, windows, vocabulary=vocabulary, progress=progress).to_dict()
        else:
            found = metrics.divergence(original, loaded, windows, vocabulary=vocabulary, progress=progress).to_dict()
    return found if rounding is None else {**found, "activations": asdict(rounding[0]), "rounded_layers": layers}


def rounded_activations(
    model: str, spec: str | None, calibration: str | None, trust_remote_code: bool
) -> tuple[Activations, torch.Tensor | None] | None:
    """What `measure` is to do to activations; windows of text for those of a static range. Raises PlanError."""
    if spec is None:
        return None
    activations = Activations.parse(spec)
    if activations.mode == "dynamic":
        return activations, None
    if calibration is None:
        raise PlanError(f"activations {spec}: their range is found on text: give it with --calibration")
    folder = Checkpoint(locate(model)).folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    length = min(512, text.window_length(config))
    tokenizer = text.load_tokenizer(folder, trust_remote_code)
    return activations, text.calibration_windows(tokenizer, calibration, count=OBSERVED, length=length, seed=0)


def load_any(model: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model, quantized or not, on the default device, to be run.

    Raises PlanError where transformers needs a package for it that is not there.
    """
    transformers.utils.logging.disable_progress_bar()
    folder = locate(model)
    try:
        loaded: PreTrainedModel = loader_of(Checkpoint(folder).config()).from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except ImportError as error:  # of the packages of other quantizers
        raise PlanError(f"{model} cannot be loaded: {error}; or give it in another form") from None
    return loaded.to(default_device()).eval()
