"""Train the bundled model: a small Llama that has read Python's standard library.

The text is the `.py` files of the interpreter's own standard library: the script needs no network. Whole
packages (`HELD_OUT`) and all that is named after them are kept out of training: they are what evaluation reads.

    python tests/assets/train_pycode.py --held-out held_out.json                    # write the evaluation text
    python tests/assets/train_pycode.py --training train.json                       # write the text that it has read
    python tests/assets/train_pycode.py --output tests/assets/pycode --autocast     # train; more than an hour

`training.json` beside the weights says with which arguments and versions they were made.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("email", "http", "html", "json", "logging", "xml", "wsgiref", "sqlite3")
# Tables of data rather than code, copies of other projects, and what is not installed everywhere.
LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "lib2to3",
    "config-",
    "__phello__",
)
BOS, EOS = "<|bos|>", "<|eos|>"
VOCABULARY, WINDOW = 1536, 512
MAX_FILE_BYTES = 200_000


def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(held_out: bool) -> list[Path]:
    root = stdlib()
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if any(part in relative for part in LEFT_OUT) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        belongs = relative.split("/")[0] in HELD_OUT
        mentions = any(name in relative for name in HELD_OUT)
        if belongs if held_out else not mentions:
            found.append(path)
    return found


def documents(held_out: bool) -> list[str]:
    """The files as text, sorted by path: those of the held-out packages, or all that do not name one."""
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in _files(held_out))
    return [text for text in texts if text.strip()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: every text is representable, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All documents as one int64 stream, each after a BOS (the post-processor writes it)."""
    ids = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    return torch.cat(ids)


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, windows: int | None = None) -> float:
    """exp of the mean cross-entropy over windows of 512 tokens (the first token of each is not predicted)."""
    model.eval()
    rows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)[:windows]
    total = 0.0
    for batch in rows.split(16):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    model.train()
    return math.exp(total / len(rows))


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = 200
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def train(model: LlamaForCausalLM, stream: torch.Tensor, check: torch.Tensor, args: argparse.Namespace) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    start = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        offsets = torch.randint(len(stream) - WINDOW, (args.batch,), generator=generator)
        batch = torch.stack([stream[i : i + WINDOW] for i in offsets.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            held = f" held-out perplexity {perplexity(model, check, 64):.2f}" if step % 500 == 0 else ""
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s{held}", flush=True)
            if step % 1000 == 0 and step:
                model.save_pretrained(args.output / "unfinished")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, help="write the evaluation text there as a JSON list, and stop")
    parser.add_argument("--training", type=Path, help="write the training text there as a JSON list, and stop")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pycode")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--autocast", action="store_true", help="bfloat16 forward (faster where the CPU has AMX)")
    args = parser.parse_args()
    wanted = {held_out: path for held_out, path in ((True, args.held_out), (False, args.training)) if path is not None}
    for held_out, path in wanted.items():
        path.write_text(json.dumps(documents(held_out)))
    if wanted:
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    texts = documents(held_out=False)
    tokenizer = train_tokenizer(texts)
    stream, check = token_stream(tokenizer, texts), token_stream(tokenizer, documents(held_out=True))
    characters = sum(map(len, texts))
    print(
        f"{len(texts)} files, {characters} characters, {len(stream)} tokens; held out {len(check)} tokens", flush=True
    )
    model = build_model()
    train(model, stream, check, args)

    model = model.to(torch.bfloat16)
    model.save_pretrained(args.output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=WINDOW
    ).save_pretrained(args.output)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("output", "held_out", "training")},
        "training_tokens_in_corpus": len(stream),
        "held_out_packages": HELD_OUT,
        "held_out_tokens": len(check),
        "held_out_perplexity_bf16_weights": round(perplexity(model.float(), check), 3),
    }
    (args.output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
