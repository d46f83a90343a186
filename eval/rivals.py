"""Quantize a model with one tool, in the environment that has the tool; `compare.py` runs this file.

    PYTHON eval/rivals.py METHOD --model DIR --tokens calibration.npy --format int3:g32:sym --output weights.safetensors

Every method gets the same calibration tokens and the same list of layers, and gives back its quantized weights decoded
to float32, under the names of the dense model's parameters. Of the tools only their public entry points are called, as
a user would, with their defaults; what differs from that is said where it is done. The last line of stdout is one JSON
object: seconds of wall clock and of CPU spent quantizing (not loading nor decoding; for llmquant, which streams, all of
reading, quantizing, writing and verifying), peak memory of the whole process until then, and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]  # name of a parameter -> (out, in) float32
BATCH = 8  # windows at a time, for every tool that asks


@dataclass
class Job:
    """What to quantize, and how; `facts` collects what is to be reported.

    tokens (windows, length) int64. bits, group, symmetric: of integers; kind: "int" or the name of another format.
    iterations: of AutoRound. layers: what is quantized; skipped: linears of the blocks that no method may touch.
    """

    model: str
    tokens: np.ndarray
    kind: str
    bits: int
    group: int
    symmetric: bool
    seed: int
    iterations: int
    layers: list[str]
    skipped: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def rows(self) -> list[dict[str, list[int]]]:
        return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in self.tokens.tolist()]

    def only_integers(self) -> None:
        if self.kind != "int":
            raise NotImplementedError(f"integers only, not {self.kind}")

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note what the work inside takes, and the peak memory up to its end."""
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        yield
        self.facts["wall_seconds"] = round(time.perf_counter() - wall, 3)
        self.facts["cpu_seconds"] = round(sum(os.times()[:4]) - cpu, 3)
        self.facts["peak_bytes"] = peak_bytes()


def peak_bytes() -> int:
    """Peak resident memory of this process; Linux only. (getrusage counts that of the process which started it too.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def parse(spec: str) -> tuple[str, int, int, bool]:
    """(kind, bits, group, symmetric) of a format's name: "int3:g32:sym", "int4:g128:asym", "mxfp4".

    >>> parse("int3:g32:asym")
    ('int', 3, 32, False)
    """
    if (found := re.fullmatch(r"int([2-8]):g(\d+):(sym|asym)", spec)) is not None:
        return "int", int(found[1]), int(found[2]), found[3] == "sym"
    if spec in OTHER_FORMATS:
        return spec, *OTHER_FORMATS[spec]
    raise ValueError(f"{spec}: expected int<bits>:g<columns>:sym, the same with asym, or {', '.join(OTHER_FORMATS)}")


OTHER_FORMATS = {"mxfp4": (4, 32, True), "nvfp4": (4, 16, True)}  # name -> bits, columns of a group, symmetric


# ---- llmquant


def spec(job: Job, convention: str = "sym_full") -> str:
    """The format by its name here; convention: of symmetric integers, how levels lie about zero."""
    if job.kind != "int":
        return job.kind
    tail = "asym" if not job.symmetric else "" if convention == "sym_full" else convention
    return ":".join(filter(None, [f"int{job.bits}", f"g{job.group}", tail]))


def llmquant(job: Job, quality: str, *options: str, convention: str = "sym_full", calibrated: bool = False) -> Weights:
    """The command line, in this process. calibrated: show it the tokens though the preset can do without."""
    from llmquant import hf, pipeline  # noqa: F401  (imported before the clock starts, as the others are)
    from llmquant.cli import app
    from llmquant.recipe import QUALITIES

    skips = [part for name in job.skipped for part in ("--skip", name)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "quantized"
        command = [
            "quantize",
            job.model,
            "--output",
            str(output),
            "--format",
            spec(job, convention),
            "--quality",
            quality,
            "--json",
        ]
        if calibrated or QUALITIES[quality].calibrated:
            save_file({"tokens": torch.from_numpy(job.tokens)}, f"{folder}/tokens.safetensors")
            command += ["--calibration", f"{folder}/tokens.safetensors", "--samples", str(len(job.tokens))]
        command += ["--batch", str(BATCH), "--seed", str(job.seed), "--device", "cpu", "--dtype", "float32"]
        with job.timed():
            app([*command, *skips, *options], standalone_mode=False)
        loaded = hf.load(str(output), dtype=torch.float32)
        job.facts["bits_per_weight"] = json.loads((output / "llmquant.json").read_text())["bits_per_weight"]
        layers = hf.quantized_layers(loaded).items()
        decoded = {f"{name}.weight": layer.dequantize(torch.float32).clone() for name, layer in layers}
        return decoded | {name: value.data for name, value in loaded.named_parameters() if value.ndim == 1}


def rtn(job: Job, clip: str) -> Weights:
    """Round to nearest on the symmetric grid of GPTQ and compressed-tensors, or the asymmetric one."""
    return llmquant(job, "fast", "--clip", clip, convention="sym_gptq")


def own(job: Job, solver: str, **options: Any) -> Weights:
    """A solver by name, with calibration and without what the presets add to it."""
    from unittest import mock

    from llmquant import curvature

    recipe: list[dict[str, Any]] = [{"pattern": name, "format": None} for name in job.skipped]
    recipe.append({"pattern": "*", "format": spec(job), "solver": solver, "options": options})
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(curvature, "curvature", return_value={}):
        path = Path(folder) / "recipe.json"
        path.write_text(json.dumps(recipe))
        return llmquant(job, "balanced", "--recipe", str(path))


# ---- GPTQModel


def gptqmodel(job: Job) -> Weights:
    """Its GPTQ by its defaults, in float32.

    A machine of two cores has to be told of two workers, or it refuses to load. Decoding is its own reader's: that
    takes float16 only, so the scales (float16 in the file) are widened before it decodes.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    job.only_integers()
    skipped: dict[str, dict] = {f"-:^{re.escape(name)}$": {} for name in job.skipped}
    config = QuantizeConfig(
        bits=job.bits, group_size=job.group, sym=job.symmetric, offload_to_disk=False, dynamic=skipped or None
    )
    model = GPTQModel.load(job.model, config, device="cpu", dtype=torch.float32)
    rows = [{key: torch.tensor(value) for key, value in row.items()} for row in job.rows()]
    with job.timed():
        model.quantize(rows, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        stored = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
        weights = {}
        for name in job.layers:
            layer = stored.get_submodule(name)
            layer.scales.data = layer.scales.data.float()
            weights[f"{name}.weight"] = layer.dequantize_weight().detach().float().T.contiguous()
    return weights


# ---- AutoRound


def auto_round(job: Job) -> Weights:
    """Its tuning of rounding and ranges, in float32: by default it would cast the model to bfloat16."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model = job.load()
    integers = {"scheme": "W4A16", "bits": job.bits, "group_size": job.group, "sym": job.symmetric}
    scheme = integers if job.kind == "int" else {"scheme": job.kind.upper(), "act_bits": 16}
    dense = {name: {"bits": 16, "data_type": "float"} for name in job.skipped}
    rows = [{key: torch.tensor(value) for key, value in row.items()} for row in job.rows()]
    tool = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        dataset=torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=False),  # type: ignore[arg-type]
        nsamples=len(job.tokens),
        seqlen=job.tokens.shape[1],
        batch_size=BATCH,
        iters=job.iterations,
        seed=42 + job.seed,  # its default is 42
        amp=False,
        device_map="cpu",
        low_cpu_mem_usage=False,
        enable_torch_compile=False,
        layer_config=dense or None,
        **scheme,
    )
    with job.timed():
        quantized, _ = tool.quantize()
    parameters = {name.replace(".orig_layer", ""): value for name, value in quantized.named_parameters()}
    return {f"{name}.weight": parameters[f"{name}.weight"].detach().float() for name in job.layers}


# ---- llm-compressor


def llm_compressor(job: Job, modifiers: Callable[..., Any], calibrated: bool = True) -> Weights:
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    model = job.load()
    scheme = QuantizationScheme(targets=["Linear"], weights=_compressed_tensors_arguments(job))
    recipe = modifiers(config_groups={"group_0": scheme}, ignore=["lm_head", *job.skipped])
    shown: dict[str, Any] = {}
    if calibrated:
        windows, length = job.tokens.shape
        shown = {"dataset": Dataset.from_list(job.rows()), "max_seq_length": length, "num_calibration_samples": windows}
    _do_without_pinned_memory()
    with job.timed():
        oneshot(model=model, recipe=recipe, tokenizer=AutoTokenizer.from_pretrained(job.model), **shown)
    weights = {}
    for name in job.layers:
        layer = model.get_submodule(name)
        zero, whole = (getattr(layer, f"weight_{part}", None) for part in ("zero_point", "global_scale"))
        how = layer.quantization_scheme.weights
        decoded = fake_quantize(layer.weight, layer.weight_scale, zero, how, global_scale=whole)
        weights[f"{name}.weight"] = decoded.detach().float()
    # What moves scales between layers changes norms and other dense parameters too.
    changed = {name: value.detach().float() for name, value in model.named_parameters() if value.ndim == 1}
    return {**{name: value for name, value in changed.items() if name.endswith(("weight", "bias"))}, **weights}


def _compressed_tensors_arguments(job: Job) -> Any:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    if job.kind != "int":
        return PRESET_SCHEMES[f"{job.kind.upper()}A16"]["weights"]
    return QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=job.symmetric, strategy="group", group_size=job.group
    )


def _do_without_pinned_memory() -> None:
    """AWQ pins memory whether or not there is an accelerator, which fails where there is none."""
    if torch.accelerator.is_available():
        return
    from llmcompressor.pipelines import cache

    for kind in vars(cache).values():
        if isinstance(kind, type) and hasattr(kind, "_pin_intermediate"):
            kind._pin_intermediate = lambda *_: None


def llm_compressor_gptq(job: Job) -> Weights:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return llm_compressor(job, GPTQModifier)


def llm_compressor_awq(job: Job) -> Weights:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return llm_compressor(job, lambda **scheme: [AWQModifier(), QuantizationModifier(**scheme)])


def llm_compressor_rtn(job: Job) -> Weights:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return llm_compressor(job, QuantizationModifier, calibrated=False)


# ---- HQQ


def hqq(job: Job) -> Weights:
    """It has no symmetric mode and keeps a real zero point, so it spends more bits than the others."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    job.only_integers()
    model = job.load()
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)
    quantized = {}
    with job.timed():
        for name in job.layers:
            layer = model.get_submodule(name)
            quantized[name] = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    return {
        f"{name}.weight": layer.dequantize().detach().float().reshape(model.get_submodule(name).weight.shape)
        for name, layer in quantized.items()
    }


# ---- one run

METHODS: dict[str, Callable[[Job], Weights]] = {
    "llmquant-fast-calibrated": lambda job: llmquant(job, "fast", calibrated=True),
    "llmquant-balanced-unchecked": lambda job: llmquant(job, "balanced", "--no-calibration-check"),
    "rtn": lambda job: rtn(job, "minmax"),
    "rtn-mse": lambda job: rtn(job, "mse"),
    # Methods as published, by the code of this project; of its hqq, too, the zero point is real.
    "own-gptq": lambda job: own(job, "gptq", target=False, rounds=0),
    "own-gptaq": lambda job: own(job, "gptaq"),
    "own-adaround": lambda job: own(job, "adaround"),
    "own-autoround": lambda job: own(job, "autoround"),
    "own-hqq": lambda job: llmquant(job, "fast", "--solver", "hqq", convention="asym_float"),
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
    "llm-compressor-gptq": llm_compressor_gptq,
    "llm-compressor-awq": llm_compressor_awq,
    "llm-compressor-rtn": llm_compressor_rtn,
    "hqq": hqq,
}
# Start of a method's name -> the distributions whose versions are reported; the rest are llmquant's own.
PACKAGES = {
    "gptqmodel": ["gptqmodel"],
    "auto-round": ["auto-round"],
    "llm-compressor": ["llmcompressor", "compressed-tensors"],
    "hqq": ["hqq"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", metavar="METHOD", help=f"llmquant-QUALITY, {', '.join(METHODS)}")
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--tokens", required=True, help=".npy: (windows, length) int64")
    parser.add_argument("--format", required=True, help="int3:g32:sym, int4:g128:asym, mxfp4, ...")
    parser.add_argument("--layers", required=True, help='JSON: {"layers": [names to quantize], "skipped": [names]}')
    parser.add_argument("--output", required=True, help="safetensors of the decoded weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    return parser.parse_args()


def versions(method: str) -> dict[str, str]:
    own = next((names for tool, names in PACKAGES.items() if method.startswith(tool)), ["llmquant"])
    return {name: metadata.version(name) for name in [*own, "torch", "transformers"]}


def main() -> None:
    args = arguments()
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    names = json.loads(Path(args.layers).read_text())
    job = Job(args.model, np.load(args.tokens), *parse(args.format), args.seed, args.iterations, **names)
    if args.method in METHODS:
        weights = METHODS[args.method](job)
    else:
        weights = llmquant(job, args.method.removeprefix("llmquant-"))
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, args.output)
    print(json.dumps({**job.facts, "threads": torch.get_num_threads(), "versions": versions(args.method)}))


if __name__ == "__main__":
    status = 0
    try:
        main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # some tools leave threads behind that never end
