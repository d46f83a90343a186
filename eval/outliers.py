"""Llamas that compute what they did, with what large models have: outliers that weights undo, massive activations.

Massive activations: one early block writes values thousands of times as large as all others into two channels of the
residual stream, at the first token alone, and one late block takes them away again (M. Sun et al., "Massive Activations
in Large Language Models", arXiv:2402.17762).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
LOUD = 30.0  # what the gate, and what is gated, are where a massive activation is written
SIGNS = (1.0, -0.6)  # of the two channels, and by which share the second one is smaller
WRITERS = 16  # neurons that write it


def loaded(model: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def saved(llama: LlamaForCausalLM, model: Path, folder: Path) -> Path:
    """The model in a folder, with the tokenizer of `model`."""
    llama.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


@torch.no_grad()
def hidden_by_norms(llama: LlamaForCausalLM, factor: float, channels: int = 5) -> LlamaForCausalLM:
    """Some channels of every norm multiplied by the factor, and divided by it where they are read."""
    generator = torch.Generator().manual_seed(0)
    for block in llama.model.layers:
        for norm, readers in READERS.items():
            weight = block.get_submodule(norm).weight
            chosen = torch.randperm(len(weight), generator=generator)[:channels]
            weight[chosen] *= factor
            for reader in readers:
                block.get_submodule(reader).weight[:, chosen] /= factor
    return llama


@torch.no_grad()
def widened(llama: LlamaForCausalLM, channels: int = 64, neurons: int = 64) -> tuple[LlamaForCausalLM, Tensor]:
    """The same model with channels and neurons in which nothing happens; the new channels lie anywhere among the old.

    Returns it and the numbers of the new channels. What reads them has weights like any others.
    """
    config = llama.config
    old, width = config.hidden_size, config.hidden_size + channels
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(width, generator=generator)
    live, free = order[:old].sort().values, order[old:]
    sizes = {"hidden_size": width, "intermediate_size": config.intermediate_size + neurons}
    share = old / width  # of the mean square
    wide = LlamaForCausalLM(
        LlamaConfig(**config.to_dict() | sizes | {"rms_norm_eps": config.rms_norm_eps * share})
    ).eval()
    for name, target in wide.state_dict().items():
        source = llama.state_dict()[name]
        if source.ndim == 1:
            target.fill_(source.mean()).index_copy_(0, live, source).mul_(share**0.5)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            target.zero_()[live, : source.shape[1]] = source
        elif "embed_tokens" in name or "lm_head" in name:
            target.zero_()[:, live] = source
        else:
            target.normal_(0, float(source.std()), generator=generator)[:, live] = nn.functional.pad(
                source, (0, 0, 0, len(target) - len(source))
            )
            target[len(source) :] = 0
    return wide, free


@torch.no_grad()
def massive(llama: LlamaForCausalLM, size: float = 30000.0, first: int = 1, last: int = 4) -> LlamaForCausalLM:
    """The model widened, with activations of that size at the first token, BOS, from block `first` to block `last`.

    What reads them is changed, so that it puts out for a BOS that begins a text what it did before.
    """
    neurons = llama.config.intermediate_size  # those beyond are free
    wide, free = widened(llama)
    flag, *channels = free[:3].tolist()  # a channel that tells BOS from all other tokens, and the massive ones
    bos = llama.config.bos_token_id
    norms: list[tuple[Any, str, nn.Module]] = [
        (block.get_submodule(norm), norm, block) for block in wide.model.layers for norm in READERS
    ]
    linears: list[Any] = [block.get_submodule(name) for _, norm, block in norms for name in READERS[norm]]
    wanted = {linear: _at(wide, bos, linear)[1] for linear in linears}
    wide.model.embed_tokens.weight[bos, flag] = wide.model.embed_tokens.weight[bos].square().mean().sqrt()
    wide.model.norm.weight[[flag, *channels]] = 0
    for norm, _, _ in norms:
        norm.weight[flag] *= 0.05
        norm.weight[channels] *= 0.3
    wide.model.layers[first].post_attention_layernorm.weight[flag] *= 400
    for index, block in enumerate(wide.model.layers[: last + 1]):
        linear: Any
        for readers in READERS.values() if index > first else ():
            for linear in map(block.get_submodule, readers):
                x, y = _at(wide, bos, linear)
                change = (wanted[linear] - y) / x[channels[0]]
                linear.weight[:neurons, channels[0]] += change[:neurons]
        if index == first:
            _write(wide, block.mlp, flag, channels, size)
        if index == last:
            _write(wide, block.mlp, channels[0], channels, -size)
    return wide


def _write(wide: LlamaForCausalLM, mlp: Any, read: int, channels: list[int], size: float) -> None:
    """Free neurons of an MLP write values of that size to the channels where the channel `read` says so, alone."""
    x, _ = _at(wide, wide.config.bos_token_id, mlp.gate_proj)
    generator = torch.Generator().manual_seed(int(size > 0))
    for linear in (mlp.gate_proj, mlp.up_proj):
        if size > 0:
            linear.weight[:, read] = 0  # nothing else is to see the flag
        linear.weight[-WRITERS:] = 0
        linear.weight[-WRITERS:, read] = LOUD / x[read]
    for channel, sign in zip(channels, SIGNS, strict=True):
        shares = torch.rand(WRITERS, generator=generator) + 0.3
        mlp.down_proj.weight[channel, -WRITERS:] = sign * size / LOUD**2 * shares / shares.sum()


def _at(llama: LlamaForCausalLM, token: int, linear: Any) -> tuple[Tensor, Tensor]:
    """What a linear reads and puts out for a token that begins a text, (in,) and (out,)."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = linear.register_forward_hook(lambda _, args, output: found.append((args[0][0, 0], output[0, 0])))
    llama(torch.tensor([[token]]))
    handle.remove()
    return found[0]
