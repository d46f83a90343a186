"""How good and how large a model is: perplexity, divergence from a reference, stored size.

Evaluation reads windows (n, length) of token ids: positions 0 .. length-2 of a window predict its tokens 1 .. length-1,
windows know nothing of each other, and all weigh the same. Logits are taken to float32, sums over tokens to float64.
Everything is in nats. Logits are never held for more than one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant import formats
from llmquant.checkpoint import Checkpoint
from llmquant.errors import CheckpointError, DataError, VerificationError
from llmquant.experts import packed_name
from llmquant.formats import Format
from llmquant.text import Progress, evaluating

BATCH_BYTES = 2**29  # of float32 logits, in one batch of windows
BATCH_TOKENS = 2**13  # beyond this a batch is no faster, and where the vocabulary is small its activations are large
CHUNK_BYTES = 2**26  # of float32 logits, in one piece of a window that is reduced at once


# ---- perplexity


@dataclass(frozen=True)
class Perplexity:
    """window_nll: mean negative log-likelihood of each window's predicted tokens, nats; tokens: predicted in all."""

    window_nll: tuple[float, ...]
    tokens: int

    @property
    def nll(self) -> float:
        """Nats per token."""
        return _mean(self.window_nll)

    @property
    def perplexity(self) -> float:
        return _exp(self.nll)

    @property
    def standard_error(self) -> float | None:
        """Of nll, from the spread between windows; None for one window. That of the perplexity is perplexity * this."""
        return _standard_error(self.window_nll)

    def to_dict(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "nll_standard_error": self.standard_error,
            "tokens": self.tokens,
            "windows": len(self.window_nll),
        }


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    vocabulary: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """exp of the mean cross-entropy: the protocol of GPTQ (arXiv 2210.17323), whose windows all weigh the same.

    windows (n, length) int64. vocabulary: tokens there really are, if the logits have rows beyond (padding); these then
    take no part. batch: windows at a time, by default as many as memory should bear. progress: windows done, of n.
    Raises DataError for windows that cannot be evaluated, VerificationError naming the window if logits are not finite.
    """
    size = _check_windows(windows, [model], vocabulary)
    window_nll: list[float] = []
    with evaluating(model):
        for rows in windows.split(batch or _batch_size(windows, size)):
            logits = _logits(model, rows)
            for targets, row_logits in zip(rows[:, 1:], logits, strict=True):
                who = f"window {len(window_nll)}: the model"
                pieces = _pieces(targets, [(who, row_logits)], size)
                total = sum(
                    nn.functional.cross_entropy(x, y, reduction="none").double().sum().item() for y, (x,) in pieces
                )
                window_nll.append(total / len(targets))
            if progress is not None:
                progress(len(window_nll), len(windows))
    return Perplexity(tuple(window_nll), windows[:, 1:].numel())


# ---- divergence


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) of the next token's distribution, nats, over all predicted tokens; and what goes with it.

    standard_error: of the mean, from the spread between windows; None for one window.
    top1_agreement: share of tokens where both find the same one likeliest (of equals, the lowest id).
    rms_probability_change: root mean square of the change of the true token's probability.
    window_means: the mean divergence of each window.
    """

    mean: float
    median: float
    percentile_99: float
    percentile_99_9: float
    maximum: float
    standard_error: float | None
    top1_agreement: float
    rms_probability_change: float
    tokens: int
    window_means: tuple[float, ...]
    reference: Perplexity
    model: Perplexity

    @property
    def perplexity_ratio(self) -> float:
        """The model's perplexity over the reference's."""
        return _exp(self.model.nll - self.reference.nll)

    @property
    def perplexity_ratio_error(self) -> float | None:
        """The standard error of the ratio; windows are paired, so it is far below those of the perplexities."""
        pairs = zip(self.model.window_nll, self.reference.window_nll, strict=True)
        error = _standard_error(tuple(after - before for after, before in pairs))
        return None if error is None else self.perplexity_ratio * error

    def to_dict(self) -> dict[str, Any]:
        return {
            "kl_mean": self.mean,
            "kl_standard_error": self.standard_error,
            "kl_median": self.median,
            "kl_99": self.percentile_99,
            "kl_99_9": self.percentile_99_9,
            "kl_max": self.maximum,
            "top1_agreement": self.top1_agreement,
            "rms_probability_change": self.rms_probability_change,
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_standard_error": self.perplexity_ratio_error,
            "tokens": self.tokens,
            "reference": self.reference.to_dict(),
            "model": self.model.to_dict(),
        }


def divergence(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    windows: Tensor,
    *,
    vocabulary: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with its reference, token by token, on windows (n, length) int64.

    Both run on the same batches; one float32 per token is kept, so the quantiles are exact (linear between tokens).
    vocabulary, batch, progress, errors: as for perplexity; where the two have logits of different widths, the narrower
    is taken as the vocabulary.

    Examples:
        >>> import torch
        >>> windows = torch.arange(96).view(2, 48)
        >>> original = llmquant.api.load_any(str(MODEL), torch.float32)
        >>> found = llmquant.metrics.divergence(original, original, windows)
        >>> found.mean, found.top1_agreement, found.tokens
        (0.0, 1.0, 94)
    """
    tally = Tally(_check_windows(windows, [reference, model], vocabulary))
    with evaluating(reference, model):
        for rows in windows.split(batch or _batch_size(windows, tally.vocabulary)):
            logits = zip(_logits(reference, rows), _logits(model, rows), strict=True)
            for targets, (before, after) in zip(rows[:, 1:], logits, strict=True):
                tally.add(targets, before, after)
            if progress is not None:
                progress(len(tally.per_token), len(windows))
    return tally.divergence()


@dataclass
class Tally:
    """Of a comparison under way, one window after another. vocabulary: columns of the logits that count."""

    vocabulary: int
    per_token: list[Tensor] = field(default_factory=list)  # a window's divergences
    window_sums: list[list[float]] = field(default_factory=list)

    def add(self, targets: Tensor, reference: Tensor, model: Tensor) -> None:
        """One window: its predicted tokens (length - 1,) and the logits (length - 1, vocabulary or more) of both.

        All windows have one length. Raises VerificationError naming the window if logits are not finite.
        """
        where = f"window {len(self.per_token)}"
        sides = [(f"{where}: the reference", reference), (f"{where}: the model", model)]
        compared = [_compare(p, q, y) for y, (p, q) in _pieces(targets, sides, self.vocabulary)]
        columns = torch.cat(compared, dim=1)
        self.per_token.append(columns[0].cpu())
        self.window_sums.append(columns.double().sum(1).tolist())

    def divergence(self) -> Divergence:
        return _summary(torch.cat(self.per_token), torch.tensor(self.window_sums, dtype=torch.float64))


def _compare(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) float32 of reference and model, targets (tokens,) -> (5, tokens) float32.

    Rows: KL(p || q); -log p and -log q of the target; the square of its probability's change; whether both agree.
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    true_p, true_q = (x.gather(-1, targets[:, None])[:, 0] for x in (log_p, log_q))
    agree = (p_logits.argmax(-1) == q_logits.argmax(-1)).float()  # argmax takes the first of equals
    return torch.stack([kl, -true_p, -true_q, (true_q.exp() - true_p.exp()).square(), agree])


def _summary(kl: Tensor, window_sums: Tensor) -> Divergence:
    """kl (tokens,) float32; window_sums (windows, 5) float64, the rows of _compare summed over each window."""
    tokens = len(kl)
    means = window_sums / (tokens // len(window_sums))
    kl_means, p_nll, q_nll = (tuple(column.tolist()) for column in means[:, :3].T)
    # float64, because float32 cannot address the tokens beyond 2**24
    median, high, higher = np.quantile(kl.double().numpy(), [0.5, 0.99, 0.999]).tolist()
    return Divergence(
        mean=_mean(kl_means),
        median=median,
        percentile_99=high,
        percentile_99_9=higher,
        maximum=kl.max().item(),
        standard_error=_standard_error(kl_means),
        top1_agreement=means[:, 4].mean().item(),
        rms_probability_change=means[:, 3].mean().sqrt().item(),
        tokens=tokens,
        window_means=kl_means,
        reference=Perplexity(p_nll, tokens),
        model=Perplexity(q_nll, tokens),
    )


# ---- what both share


def _check_windows(windows: Tensor, models: list[PreTrainedModel], vocabulary: int | None) -> int:
    """The number of tokens that count: the vocabulary if known, else the width of the narrowest logits."""
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise DataError(f"windows of shape {tuple(windows.shape)}: at least one of two tokens is needed")
    widths = [model.config.get_text_config().vocab_size for model in models]
    size = min([*widths, *([] if vocabulary is None else [vocabulary])])
    low, high = windows.min().item(), windows.max().item()
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise DataError(f"token {wrong} is outside the vocabulary of {size}: is this the model's own tokenizer?")
    return size


def _batch_size(windows: Tensor, vocabulary: int) -> int:
    length = windows.shape[1]
    return max(1, min(BATCH_BYTES // (4 * length * vocabulary), BATCH_TOKENS // length))


def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """(windows, length - 1, vocabulary), in the model's dtype: what positions 0 .. length-2 predict."""
    return model(input_ids=rows.to(model.device), use_cache=False).logits[:, :-1]


def _pieces(targets: Tensor, sides: list[tuple[str, Tensor]], vocabulary: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Walk one window in pieces of bounded size: (targets (tokens,), a list of logits (tokens, vocabulary) float32).

    targets (length - 1,); sides: (who, logits (length - 1, rows of the head)). All pieces are on the device of the last
    side. Raises VerificationError, beginning with `who`, if a logit is NaN or infinite.
    """
    device = sides[-1][1].device
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, len(targets), step):
        piece = []
        for who, logits in sides:
            x = logits[start : start + step, :vocabulary].to(device, torch.float32)
            low, high = torch.aminmax(x)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise VerificationError(f"{who} gives logits that are not finite: its weights are damaged or overflow")
            piece.append(x)
        yield targets[start : start + step].to(device), piece


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: tuple[float, ...]) -> float | None:
    """Of the mean; None where one value has no spread."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


# ---- size


@dataclass(frozen=True)
class StoredSize:
    """What a folder's weights take. Bytes are of tensors; file_bytes are of the files, with their headers.

    quantized_*: of the quantized modules' weights with all that belongs to them (scales, zero points, shapes, padding).
    parameters, parameter_bytes: of the whole model; an embedding that is also the head counts once.
    """

    quantized_weights: int
    quantized_bytes: int
    parameters: int
    parameter_bytes: int
    file_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized weights; None for a dense model."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None

    @property
    def bits_per_parameter(self) -> float:
        """Of all the model's parameters."""
        return 8 * self.parameter_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "quantized_weights": self.quantized_weights,
            "quantized_bytes": self.quantized_bytes,
            "parameters": self.parameters,
            "parameter_bytes": self.parameter_bytes,
            "file_bytes": self.file_bytes,
        }


def stored_size(folder: Path) -> StoredSize:
    """The size of a dense folder or one of llmquant's, from headers alone: no weight is read.

    Raises CheckpointError: not a safetensors folder, quantized by something else, or a quantized module lacks tensors.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config()
    names, modules = set(checkpoint.names()), quantized_modules(config, folder)
    for name in list(modules):  # of experts, the name of what holds them
        packed = f"{name.rpartition('.')[0]}.{packed_name(name)}"
        if f"{packed}.weight_packed" in names or f"{packed}.weight" in names:
            modules[packed] = modules.pop(name)
    groups: dict[str, list[str]] = {module: [] for module in modules}
    dense: list[str] = []
    for name in checkpoint.names():
        module, _, suffix = name.rpartition(".")
        groups[module].append(name) if module in groups and suffix != "bias" else dense.append(name)
    # A head that is stored though it is tied is a copy; buffers of integers and booleans are no parameters.
    tied = config.get("tie_word_embeddings", False) or config.get("text_config", {}).get("tie_word_embeddings", False)
    dense = [n for n in dense if checkpoint.dtype(n).is_floating_point and not (tied and n.endswith("lm_head.weight"))]

    weights = sum(_weights_of(module, modules[module], names, checkpoint) for module, names in groups.items())
    nbytes = sum(checkpoint.nbytes(name) for names in groups.values() for name in names)
    return StoredSize(
        quantized_weights=weights,
        quantized_bytes=nbytes,
        parameters=weights + sum(math.prod(checkpoint.shape(name)) for name in dense),
        parameter_bytes=nbytes + sum(checkpoint.nbytes(name) for name in dense),
        file_bytes=sum((folder / file).stat().st_size for file in checkpoint.files()),
    )


def quantized_modules(config: dict[str, Any], folder: Path) -> dict[str, Format]:
    """Module -> its format, as a folder's config.json says; none for a dense folder.

    Raises CheckpointError where something else quantized it, or the entry is malformed.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "llmquant":
        raise CheckpointError(f"{folder}: quantized by {method}; only dense folders and llmquant's own are known here")
    return formats.listed_modules(quantization.get("formats"))


def _weights_of(module: str, fmt: Format, names: list[str], checkpoint: Checkpoint) -> int:
    """How many weights a quantized module stands for: as its `weight_shape` says, else as many as its bytes hold."""
    if f"{module}.weight_shape" in names:
        shape = checkpoint.tensors([f"{module}.weight_shape"])[f"{module}.weight_shape"]
        return int(shape.prod(-1).sum())  # of experts, one row each
    shapes = {name.removeprefix(f"{module}."): checkpoint.shape(name) for name in names}
    if not {"weight", "weight_packed"} & set(shapes):
        raise CheckpointError(f"{checkpoint.folder}: {module} is listed as quantized, but its weight is not stored")
    return fmt.weights_in(shapes)
