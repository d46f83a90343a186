"""A Llama of any size with random weights, to measure memory and time on: one block is in memory at a time.

    python eval/random_checkpoint.py FOLDER --hidden 4096 --intermediate 11008 --blocks 3

The weights are normal with the deviation of an untrained model, so that activations stay finite. The tokenizer files of
another model may be copied in, if its vocabulary is no larger: then calibration takes text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokenizer", type=Path, help="a folder with the files of a tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(options.seed)
    weight_map: dict[str, str] = {}
    total = 0
    for part in range(options.blocks + 1):
        shapes = outside(options) if part == options.blocks else block(options, part)
        tensors = {name: random(shape, generator) for name, shape in shapes.items()}
        file = f"model-{part + 1:05d}-of-{options.blocks + 1:05d}.safetensors"
        save_file(tensors, options.folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.folder / INDEX).write_text(json.dumps(index))
    (options.folder / "config.json").write_text(json.dumps(config(options), indent=2))
    for path in options.tokenizer.glob("tokenizer*") if options.tokenizer else ():
        shutil.copy(path, options.folder)
    print(f"{options.folder}: {total:,} bytes")


def block(options: argparse.Namespace, number: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = options.hidden, options.intermediate
    matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    matrices |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in (matrices | norms).items()}


def outside(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    table = (options.vocabulary, options.hidden)
    return {"model.embed_tokens.weight": table, "model.norm.weight": (options.hidden,), "lm_head.weight": table}


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def config(options: argparse.Namespace) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.blocks,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


if __name__ == "__main__":
    main()
