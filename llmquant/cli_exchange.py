"""Commands that hand a model on: generate, export, convert, push, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli_common import (
    FolderArgument,
    JsonOption,
    MaxWindowsOption,
    ModelArgument,
    OverwriteOption,
    TextOption,
    TrustOption,
    WindowOption,
    dtype_named,
    notes,
    print_lines,
    progress_bar,
    size,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What the model continues, or with --chat answers.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choices, where the temperature is above 0.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the activations [bfloat16; float32 on a CPU that does not multiply it].")
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Let MODEL, quantized or not, continue PROMPT: text as it comes, then tokens per second."""
    import torch

    from llmquant import api, generation, text
    from llmquant.checkpoint import locate
    from llmquant.skeleton import fast_dtype

    tokenizer = text.load_tokenizer(locate(model), trust_remote_code)
    own = dtype_named(dtype) if dtype else fast_dtype(api.default_device(), torch.bfloat16) or torch.bfloat16
    loaded = api.load_any(model, own, trust_remote_code)
    written = generation.stream(
        loaded,
        tokenizer,
        prompt,
        write=lambda text: print(text, end="", flush=True),
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    print()
    notes.print(written.summary(), highlight=False)


def export(
    folder: FolderArgument,
    to: Annotated[str, typer.Option(help="compressed-tensors (vLLM, SGLang, transformers), gptq, gguf or dense.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [FOLDER-TO].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check that it can be done and stop.")] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model in FOLDER in the files of another tool, whose own reader checks what was written."""
    from llmquant.exchange import export as exchange
    from llmquant.exchange.model import Model

    target = output or folder.with_name(f"{folder.name}-{to}")
    if dry_run:
        said = exchange.check(Model.open(folder), to)
    else:
        with progress_bar(as_json) as progress:
            said = exchange.export(folder, target, to, overwrite=overwrite, progress=progress)
    if as_json:
        print(json.dumps({"output": None if dry_run else str(target), "to": to, "notes": said}))
        return
    print_lines([*said, f"{folder} can be exported" if dry_run else f"exported and verified: {target}"])


def convert(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [MODEL-llmquant].")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn MODEL, in the files of compressed-tensors or GPTQ, into a folder of llmquant's, value for value."""
    from llmquant.exchange import convert as exchange

    target = output or Path(f"{Path(model).name}-llmquant")
    with progress_bar(as_json) as progress:
        facts = exchange.convert(model, target, overwrite=overwrite, progress=progress)
    if as_json:
        print(json.dumps({"output": str(target), **facts}))
        return
    formats = ", ".join(sorted({tensor["format"] for tensor in facts["tensors"]}))
    done = f"{target}: {len(facts['tensors'])} matrices in {formats}, {size(facts['bytes_after'])}"
    print_lines([*facts["notes"], done])


def push(
    folder: FolderArgument,
    repo: Annotated[str, typer.Argument(help="Where to: owner/name. It is made where there is none.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees it [as your account has it].")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch [the main one].")] = None,
) -> None:
    """Check FOLDER, and upload it with its model card to the Hugging Face hub."""
    from llmquant import hub

    print_lines([hub.push(folder, repo, private=private, revision=revision)])


def compare(
    models: Annotated[list[str], typer.Argument(help="Folders that quantize wrote.")],
    reference: Annotated[str, typer.Option(help="The unquantized model.")],
    text: TextOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("compare.html"),
    prompt: Annotated[str | None, typer.Option(help="What all continue [the first words of the text].")] = None,
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    dtype: Annotated[str, typer.Option(help="Type of the activations.")] = "float32",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """One page about several MODELS: perplexity and KL against bits, and what they write, side by side."""
    from llmquant import api, comparison
    from llmquant import text as texts
    from llmquant.checkpoint import locate
    from llmquant.output import replace_text

    folders = {name: locate(name) for name in (reference, *models)}
    short = {name: Path(name).name for name in folders}
    if len(set(short.values())) < len(short):  # folders of the same name in several places
        short = {name: name for name in folders}
    windows, vocabulary = api.evaluation_windows(reference, text, "documents", window, max_windows, trust_remote_code)
    tokenizer = texts.load_tokenizer(folders[reference], trust_remote_code)
    start = prompt or tokenizer.decode(windows[0, :24].tolist(), skip_special_tokens=True)

    named = {short[name]: folder for name, folder in folders.items()}
    with progress_bar(as_json) as progress:
        found = comparison.compare(
            named,
            short[reference],
            lambda name: api.load_any(str(named[name]), dtype_named(dtype), trust_remote_code),
            tokenizer,
            windows,
            vocabulary,
            prompt=start,
            progress=progress,
        )
    replace_text(output, comparison.page(found, start, comparison.token_count(windows)))
    if as_json:
        print(json.dumps([entry.to_json() for entry in found]))
        return
    print_lines([f"{entry.name}: perplexity {entry.perplexity:.4g}, KL {entry.kl or 0:.5f}" for entry in found])
    print_lines([f"page: {output}"])


COMMANDS = (generate, export, convert, push, compare)
