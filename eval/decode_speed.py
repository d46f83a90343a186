"""Tokens per second of a model that exists in shape only: random weights in a format, beside random dense ones.

    python eval/decode_speed.py                                   # Llama 3.1 8B, int4 in groups of 128, on a GPU
    python eval/decode_speed.py --tiny --device cpu --new-tokens 8

With --quantize-blocks N also the time that `llmquant.quantize` takes for so many blocks of the same shape.

Greedy decoding by `generate` with a static cache, which transformers compiles and turns into CUDA graphs on a GPU. The
time of one new token is taken off, and with it the prompt's. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import llmquant
from llmquant import formats
from llmquant.linear import QuantLinear

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["int4:g128"], metavar="FORMAT")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--quantize-blocks", type=int, default=0, metavar="N", help="time quantizing so many blocks, too"
    )
    parser.add_argument("--tiny", action="store_true", help="a model of two small blocks, to try this script")
    return parser.parse_args()


def build(spec: str | None, args: argparse.Namespace, blocks: int = 0) -> Any:
    """A model of random weights: all linears but the head in a format, or none."""
    dtype = getattr(torch, args.dtype)
    shape = TINY | {"num_key_value_heads": 4} if args.tiny else LLAMA_8B
    config = LlamaConfig(**(shape | {"num_hidden_layers": blocks} if blocks else shape), dtype=dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, module in list(model.named_modules()):
            if spec is not None and isinstance(module, nn.Linear) and name != "lm_head":
                made = QuantLinear(formats.get(spec), module.in_features, module.out_features, bias=False, dtype=dtype)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, made)
    model.to_empty(device=args.device)
    generator = torch.Generator(args.device).manual_seed(0)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            fill(name, tensor.data, isinstance(module, QuantLinear), generator)
    rotary = model.model.rotary_emb
    with torch.device(args.device):
        model.model.rotary_emb = type(rotary)(config)  # its buffers are no random numbers
    return model


def fill(name: str, tensor: Tensor, quantized: bool, generator: torch.Generator) -> None:
    """Codes of all bits, small scales, weights as small as those of a model."""
    if quantized and name == "weight_packed":
        tensor.view(torch.uint8).random_(0, 256, generator=generator)
    elif tensor.is_floating_point() and tensor.itemsize > 1:
        if quantized or tensor.dim() == 1:
            tensor.fill_(0.003 if quantized else 1.0)
        else:
            tensor.normal_(0, 0.02, generator=generator)
    elif name == "weight_shape":
        pass
    else:
        tensor.view(torch.uint8).fill_(0x30)  # small whatever the format of a scale of 8 bits


def tokens_per_second(model: Any, batch: int, args: argparse.Namespace) -> float:
    """Of all rows of the batch together."""
    prompt = torch.arange(batch * args.prompt_tokens, device=args.device).view(batch, -1) % model.config.vocab_size

    def seconds(new_tokens: int) -> float:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        start = time.perf_counter()
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, cache_implementation="static", pad_token_id=0, **options)
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    for _ in range(2):  # compiles
        seconds(args.new_tokens)
    times = [seconds(args.new_tokens) - seconds(1) for _ in range(args.runs)]
    return batch * (args.new_tokens - 1) / median(times)


def quantizing(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of whole runs, from checkpoint to checkpoint, on random weights and tokens: of a model in shape only."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        build(None, args, blocks=args.quantize_blocks).save_pretrained(source)
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        tokens = torch.randint(vocabulary, (64, 512), generator=torch.Generator().manual_seed(0))
        save_file({"tokens": tokens}, Path(folder) / "tokens.safetensors")
        for quality, calibration in (("fast", None), ("balanced", str(Path(folder) / "tokens.safetensors"))):
            start = time.perf_counter()
            llmquant.quantize(
                source, Path(folder) / quality, format=args.formats[0], quality=quality, calibration=calibration,
                device=args.device, verify=False,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            found.append({"quality": quality, "blocks": args.quantize_blocks, "seconds": seconds})
            print(
                f"{quality}: {seconds:.1f} s for {args.quantize_blocks} blocks, embeddings and head copied", flush=True
            )
    return found


def main() -> None:
    args = arguments()
    with torch.inference_mode():
        results = decoding(args)
    device = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "settings": vars(args), "results": results}
    if args.quantize_blocks:
        facts["quantizing"] = quantizing(args)
    print(json.dumps(facts))


def decoding(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for spec in [None, *args.formats]:
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        model = build(spec, args)
        for batch in args.batches:
            speed = tokens_per_second(model, batch, args)
            memory = 0 if args.device == "cpu" else torch.cuda.max_memory_allocated()
            results.append({"format": spec or args.dtype, "batch": batch, "tokens_per_second": speed, "memory": memory})
            dense = next(r for r in results if r["batch"] == batch)
            ratio = speed / dense["tokens_per_second"]
            said = f"batch {batch:3}: {speed:9.1f} tokens/s, {ratio:.2f} times dense, {memory / 2**30:.2f} GiB"
            print(f"{spec or args.dtype:12} {said}", flush=True)
        del model
    return results


if __name__ == "__main__":
    main()
