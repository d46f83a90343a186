"""A quantized folder beside the model it was made of: both are read from disk, block by block, never whole.

What is compared, from the least assumed to the most wanted:

weights   every quantized matrix is decoded from the folder's bytes and compared with the original, its columns scaled
          where a norm's were moved there: its error must be the one that was noted when it was solved, so that
          whatever was written, named or mapped wrongly shows. Every
          other tensor must have the original's very bytes, but for vectors where the run has tuned them.
outputs   every block is run on what the original model hands it. Of what it adds to that, it may miss FACTOR times the
          root mean square of its weights' errors, but in no format more than WORST; and, of all it puts out, two units
          in the last place. A block that misses more has made up for what those before it lost, if on what the
          quantized model hands it it does no worse, by more than that, than the original block there, and not all is
          lost already.
          Each token counts by the size of its own hidden state: what reads it divides by that, and in large models one
          token may be a thousand times as large as the others (M. Sun et al., "Massive Activations in Large Language
          Models", arXiv:2402.17762).
logits    the original and the quantized hidden states go through to the end: KL(original || quantized), which
          `max_kl` may bound.

Outputs and logits are those of causal language models, whose blocks run one by one. Nothing of the solvers is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.blocks import Call, StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError, VerificationError
from llmquant.experts import packed_name
from llmquant.formats import Format, TensorSpec
from llmquant.matrices import Target
from llmquant.metrics import Divergence, Tally, quantized_modules
from llmquant.stats import energy, ratio
from llmquant.text import window_length

# Of sound models, random and trained, in formats of 1 to 9 bits, none needed more than 2.8.
FACTOR = 6.0
WORST = 1.0  # as far off as a block that does nothing
NOTED = 0.01  # by which part the error of a matrix may differ from the one noted: sums of float32
WINDOWS, LENGTH = 2, 64  # of the check that ends every run

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Block:
    """name "": all that lies outside the blocks.

    weights: root mean square over its quantized matrices of |decoded - original| / |original|.
    error: of the block alone, on the original's hidden states, |outputs - original outputs| / |original outputs|, the
    root of the mean square over tokens; bound: what it may be at most; None where the weights have been trained.
    drift: the same behind this block, with all blocks before it quantized too, which error and bound are about where
    this one makes up for what those lost.
    """

    name: str
    matrices: int
    weights: float
    error: float | None = None
    bound: float | None = None
    drift: float | None = None


@dataclass(frozen=True)
class Verification:
    """What was found. problems: one line each; none: the folder holds what it should.

    unchecked: why no outputs were compared, if so. tokens: that were shown to both.
    """

    blocks: tuple[Block, ...]
    problems: tuple[str, ...]
    divergence: Divergence | None
    tokens: int
    unchecked: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All but the time it took, which differs from run to run."""
        worst = max(self.blocks, key=lambda block: (block.error or 0.0) / (block.bound or 1.0))
        found: dict[str, Any] = {"tokens": self.tokens, "blocks": [asdict(block) for block in self.blocks]}
        if self.divergence is not None:
            found |= {"kl_mean": self.divergence.mean, "top1_agreement": self.divergence.top1_agreement}
            found |= {"worst_block": worst.name, "worst_error": worst.error, "worst_bound": worst.bound}
        return found | ({"unchecked": self.unchecked} if self.unchecked else {})

    def check(self, folder: Path, remedy: str) -> None:
        """Raises VerificationError with the first problem, if there is any."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            raise VerificationError(f"{folder}: {self.problems[0]}{more}: {remedy}")


class Decoded:
    """A quantized folder as the dense checkpoint that it stands for; matrices are decoded when they are asked for.

    reference: the model it was made of, which knows what every module holds. Raises VerificationError where the folder
    lists a matrix that the reference lacks, or does not hold what its format needs.
    """

    def __init__(self, folder: Path, reference: StreamedModel) -> None:
        self.folder = folder
        self._reference = reference
        self._stored = Checkpoint(folder)
        self.matrices: dict[str, tuple[Format, Target]] = {}  # by the checkpoint's name of the dense weight
        self.experts: dict[str, tuple[Format, list[Target]]] = {}  # by the name in memory of what holds them
        targets = {name: [target] for name, target in reference.embeddings().items()}
        for part in reference.places:
            for target in reference.targets(part).values():
                targets.setdefault(target.listed, []).append(target)
        for name, fmt in quantized_modules(self._stored.config(), folder).items():
            keys = reference.source_keys(targets[name][0]) if name in targets else ()
            if not keys:
                raise VerificationError(f"{folder}: {name} is quantized, but the reference has no such matrix")
            if targets[name][0].expert is None:
                self.matrices[keys[0]] = fmt, targets[name][0]
            else:
                self.experts[name] = fmt, targets[name]
        if not self.matrices and not self.experts:
            raise VerificationError(f"{folder}: holds no quantized matrix of llmquant's")
        # The original's own tensors stand for the experts until `fill` has the model.
        self._original = {key: None for _, stack in self.experts.values() for key in reference.source_keys(stack[0])}
        layouts = [self._layout(key) for key in self.matrices] + [self._stacked(name) for name in self.experts]
        pieces = {piece: spec for layout in layouts for piece, spec in layout.items()}
        self._dense = [name for name in self._stored.names() if name not in pieces]
        self._check_layouts(pieces)

    def _pieces(self, key: str) -> dict[str, str]:
        """The folder's name of each stored part of a matrix -> its suffix."""
        fmt, target = self.matrices[key]
        return {key.removesuffix("weight") + suffix: suffix for suffix in fmt.layout(target.shape)}

    def _layout(self, key: str) -> dict[str, TensorSpec]:
        fmt, target = self.matrices[key]
        layout = fmt.layout(target.shape)
        return {piece: layout[suffix] for piece, suffix in self._pieces(key).items()}

    def _stacked(self, name: str) -> dict[str, TensorSpec]:
        """The folder's name of each stored part of the experts of a parameter -> what it should be."""
        fmt, stack = self.experts[name]
        base, layout = f"{stack[0].holder}.{packed_name(name)}.", fmt.layout(stack[0].shape)
        return {base + suffix: TensorSpec((len(stack), *one.shape), one.dtype) for suffix, one in layout.items()}

    def _check_layouts(self, pieces: dict[str, TensorSpec]) -> None:
        known = set(self._stored.names())
        for piece, spec in pieces.items():
            if piece not in known:
                raise VerificationError(f"{self.folder}: {piece} is missing")
            found = self._stored.shape(piece), self._stored.dtype(piece)
            if found != (spec.shape, spec.dtype):
                raise VerificationError(f"{self.folder}: {piece} is {found}, should be {spec}")

    def is_of_experts(self, key: str) -> bool:
        """Whether a tensor of the original is one that experts are made of."""
        return key in self._original

    def decoded_experts(self, model: StreamedModel, block: int) -> Iterator[tuple[Target, Tensor]]:
        """The experts of a block, each as (out, in) float32."""
        for name, (fmt, stack) in self.experts.items():
            if not name.startswith(f"{model.block_names[block]}."):
                continue
            stored = {piece.rpartition(".")[2]: tensor for piece, tensor in self._tensors(self._stacked(name)).items()}
            for number, target in enumerate(stack):
                named = {suffix: tensor[number] for suffix, tensor in stored.items()}
                yield target, fmt.decode(*fmt.unpack(named, target.shape))

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._stored.tensors(list(names))

    def fill(self, model: StreamedModel, block: int) -> None:
        """Put the decoded experts in place of the original's in a loaded block."""
        for target, decoded in self.decoded_experts(model, block):
            target.matrix(model.module(target)).data.copy_(decoded)

    def names(self) -> list[str]:
        return [*self._dense, *self.matrices, *self._original]

    def shape(self, name: str) -> tuple[int, ...]:
        original = name in self.matrices or name in self._original
        return self._reference.checkpoint.shape(name) if original else self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        original = name in self.matrices or name in self._original
        return self._reference.dtype if original else self._stored.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """Float32 where it was quantized, as it is stored where not."""
        if name in self._original:
            with self._reference.checkpoint.slices([name]) as stored:
                return stored[name][...]
        if name not in self.matrices:
            return self._stored.tensors([name])[name]
        fmt, target = self.matrices[name]
        pieces = self._pieces(name)
        named = {pieces[piece]: tensor for piece, tensor in self._stored.tensors(list(pieces)).items()}
        return target.stored(fmt.decode(*fmt.unpack(named, target.shape)))

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[Mapping[str, Any]]:
        yield {name: self.tensor(name).to(self.dtype(name)) for name in names}


@torch.no_grad()
def verify(
    folder: Path,
    reference: StreamedModel,
    windows: Tensor,
    *,
    manifest: dict[str, Any],
    max_kl: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Verification:
    """Compare a folder with the model it was made of, of which nothing needs to be loaded.

    windows (n, length) int64: what is shown to both. manifest: what the run wrote down of itself.
    Raises CheckpointError and VerificationError where the folder is not one, or not of this model.
    """
    start = time.monotonic()
    decoded = Decoded(folder, reference)
    twin = StreamedModel(
        decoded,
        device=reference.device,
        dtype=reference.dtype,
        trust_remote_code=trust_remote_code,
        decoded=True,
    )
    noted = {tensor["name"]: tensor["error"] for tensor in manifest["tensors"] if "error" in tensor}  # not converted
    tuning = manifest.get("tuning")
    tuned = "qat" in manifest or (isinstance(tuning, dict) and tuning.get("kept") is True)
    moved = _moved(manifest.get("scaled", []))
    compare = partial(_weights, decoded, reference, noted, tuned, moved)
    problems: list[str] = []
    blocks: list[Block] = []
    pair, unchecked = _begin(reference, twin, decoded, windows)
    steps = len(reference.block_names) + 1
    for index, name in enumerate(reference.block_names):
        progress("verify", index, steps)
        block = compare(name, reference.block_keys(index), problems)
        if pair is not None:
            block = pair.through(index, block)
            if "qat" in manifest:  # the weights have been trained together: no block does what the original's does
                block = replace(block, bound=None)
            elif not block.error <= block.bound:  # type: ignore[operator]  # both are there; a NaN is a problem, too
                problems.append(
                    f"{name}: its outputs are off by {block.error:.4f}, and its weights, off by {block.weights:.4f}, "
                    f"explain no more than {block.bound:.4f}"
                )
        blocks.append(block)
    progress("verify", steps - 1, steps)
    blocks.append(compare("", reference.outside_keys(), problems))
    found = None
    if pair is not None:
        found = pair.divergence(windows)
        if max_kl is not None and not found.mean <= max_kl:
            problems.append(f"KL divergence {found.mean:.4f} nats a token, the bound is {max_kl:g}")
    tokens = 0 if found is None else windows.numel()
    progress("verify", steps, steps)
    return Verification(tuple(blocks), tuple(problems), found, tokens, unchecked, time.monotonic() - start)


def random_windows(model: StreamedModel, windows: int = WINDOWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Tokens (windows, length) to show where there is no text: any input tells a broken block from a sound one.

    No more than the model takes at once; none for a model that reads no text.
    """
    if not model.causal:
        return torch.zeros(0, 0, dtype=torch.int64)
    length = min(length, window_length(model.config))
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))


# ---- weights


def _weights(
    decoded: Decoded,
    reference: StreamedModel,
    noted: dict[str, float],
    tuned: bool,
    moved: dict[str, tuple[str, float] | None],
    name: str,
    keys: list[str],
    problems: list[str],
) -> Block:
    """Compare the tensors of a block, one at a time. tuned: vectors have been trained, and are another's affair.

    moved: see _moved.
    """
    known = set(decoded.names())
    free = {reference.source_key(f"{module}.{leaf}") for module in moved for leaf in ("weight", "bias")}
    errors = []
    for key in keys:
        if key not in known:
            problems.append(f"{key}: missing")
            continue
        if decoded.is_of_experts(key):
            continue
        with reference.checkpoint.slices([key]) as stored:
            original = stored[key][...]
        found = decoded.tensor(key)
        if key not in decoded.matrices:
            changed = original.ndim < 2 and (tuned or key in free)
            if not changed and not _same_bytes(original, found):
                problems.append(f"{key}: is not quantized, but differs from the original")
            continue
        target = decoded.matrices[key][1]
        module = target.name
        if module in moved:
            if (columns := _columns(decoded, reference, moved[module])) is None:
                errors.append(noted[module])
                continue
            original = target.stored(target.seen(original).float() * columns)
        error = ratio(energy(found.sub_(original).flatten(1)), _energy(original))
        errors.append(_compared(module, key, error, noted, problems))
    if name:
        errors += _experts(name, decoded, reference, noted, problems)
    return Block(name, len(errors), math.sqrt(sum(e * e for e in errors) / max(1, len(errors))))


def _moved(notes: list[dict[str, Any]]) -> dict[str, tuple[str, float] | None]:
    """The modules between which scales were moved, whose tensors are others than the original's.

    Of those that read what one norm puts out: its name, and what it adds to its weight. Of others the block's outputs
    have to prove what they hold.
    """
    found: dict[str, tuple[str, float] | None] = {}
    for note in notes:
        offset = note.get("offset")  # none where the source is a linear
        norm = None if offset is None else (note["source"], float(offset))
        found[note["source"]] = None
        for name in note["readers"]:
            found[name] = None if name in found else norm
    return found


def _columns(decoded: Decoded, reference: StreamedModel, norm: tuple[str, float] | None) -> Tensor | None:
    """By what the columns (in,) were multiplied that read a norm: what its weight was divided by; None if unknown."""
    if norm is None:
        return None
    name, offset = norm
    key = str(reference.source_key(f"{name}.weight"))
    with reference.checkpoint.slices([key]) as stored:
        before = stored[key][...].float() + offset
    after = decoded.tensor(key).float() + offset
    return before / after if after.all() else None


def _experts(
    name: str, decoded: Decoded, reference: StreamedModel, noted: dict[str, float], problems: list[str]
) -> Iterator[float]:
    """The errors of the experts of a block: what they are made of is put together in memory."""
    block = reference.block_names.index(name)
    if not any(listed.startswith(f"{name}.") for listed in decoded.experts):
        return
    with reference.loaded(block):
        for target, found in decoded.decoded_experts(reference, block):
            original = target.matrix(reference.module(target))
            error = ratio(energy(found.sub_(original)), _energy(original))
            yield _compared(target.name, target.name, error, noted, problems)


def _compared(module: str, key: str, error: float, noted: dict[str, float], problems: list[str]) -> float:
    """The error of a matrix, which should be the one that was noted."""
    if not abs(error - noted.get(module, error)) <= NOTED * error + 1e-6:
        problems.append(f"{key}: its error is {error:.4f}, and was {noted[module]:.4f} when it was solved")
    return error


def _energy(w: Tensor) -> float:
    """Without a copy of all of it in float32."""
    return sum(energy(rows.float()) for rows in w.flatten(1).split(1024))


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not a.numel() or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# ---- outputs


@dataclass
class _Pair:
    """The hidden states of both models between two blocks, and how blocks are called."""

    reference: StreamedModel
    twin: StreamedModel
    decoded: Decoded
    original: Tensor
    quantized: Tensor
    calls: tuple[list[Call], list[Call]]

    def through(self, index: int, block: Block) -> Block:
        """Both go through a block, and the original's hidden states through the quantized block as well."""
        before, entered = self.original, self.quantized
        after = self.original = self._exact(index, before)
        with self.twin.loaded(index):
            self.decoded.fill(self.twin, index)
            alone, self.quantized = (self.twin.run_block(index, x, self.calls[1][index]) for x in (before, entered))
        last_place = 2 * torch.finfo(after.dtype).eps
        error, drift = _apart(alone, after, after), _apart(self.quantized, after, after)
        bound = min(WORST, FACTOR * block.weights) * _apart(before, after, after) + last_place
        if not error <= bound:
            exact = _apart(self._exact(index, entered), after, after)
            if drift <= (together := min(WORST, math.hypot(exact, bound))):
                return replace(block, error=drift, bound=together, drift=drift)
        return replace(block, error=error, bound=bound, drift=drift)

    def _exact(self, index: int, hidden: Tensor) -> Tensor:
        """What the original block makes of hidden states."""
        with self.reference.loaded(index):
            return self.reference.run_block(index, hidden, self.calls[0][index])

    def divergence(self, windows: Tensor) -> Divergence:
        vocabulary = self.reference.config.get_text_config().vocab_size
        tally = Tally(vocabulary)
        sides = ((self.reference, self.original), (self.twin, self.quantized))
        with self.reference.loaded(None), self.twin.loaded(None):
            for row, *hidden in zip(windows.split(1), *(states.split(1) for _, states in sides), strict=True):
                logits = [model.logits(row, states)[0, :-1] for (model, _), states in zip(sides, hidden, strict=True)]
                tally.add(row[0, 1:].to(self.reference.device), *logits)
        return tally.divergence()


def _begin(
    reference: StreamedModel, twin: StreamedModel, decoded: Decoded, windows: Tensor
) -> tuple[_Pair | None, str | None]:
    """Both models' embeddings of the windows; or why their blocks cannot run one by one."""
    if not reference.causal:
        return None, f"{type(reference.model).__name__} is no causal language model: only its weights were compared"
    entered = []
    for model in (reference, twin):
        with model.loaded(None):
            try:
                entered.append(model.embed(windows))
            except PlanError as error:
                return None, f"only weights were compared: {error}"
    (original, calls), (quantized, own_calls) = entered
    return _Pair(reference, twin, decoded, original, quantized, (calls, own_calls)), None


def _apart(a: Tensor, b: Tensor, size: Tensor) -> float:
    """The root of the mean over tokens of |a - b|^2 / |size|^2, for hidden states (.., width)."""
    apart, own = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in (a.float() - b.float(), size))
    return float((apart / own.clamp_min(torch.finfo(torch.float32).tiny)).square().mean().sqrt())
