"""What a run is asked for, and what is known before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant import formats
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError
from llmquant.plan import Plan
from llmquant.ranks import SINGLE, Ranks
from llmquant.recipe import Recipe
from llmquant.version import __version__

# Candidates of a budget: integers, which kernels and other tools take.
FORMATS = ("int2:g64", "int3:g64", "int4:g64", "int5:g64", "int6:g64", "int8:g128")
SENSITIVITIES = ("auto", "kl", "fisher", "hessian")

# progress(what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """The progress of a run that nobody watches."""


@dataclass(frozen=True)
class Calibration:
    """What is shown to the model: `samples` windows of `length` tokens.

    source: "self" (the model's own samples), a text, JSON, JSONL or parquet file, a dataset id, or token ids: a
    .safetensors with a tensor `tokens` (windows, length) int64. length None: that of given tokens, else 512, or the
    model's limit where that is lower. batch: windows that go through a block at once, at most. curvature: the share of
    the windows over which a backward pass finds out how the loss curves, for the last step of rounding; 0: none. check:
    whether text that is not of the model's own kind is mended (see domain.py).
    """

    source: str = "self"
    samples: int = 128
    length: int | None = None
    batch: int = 8
    curvature: float = 0.25
    check: bool = True

    @property
    def checked(self) -> bool:
        """Whether the text is looked at; what the model writes by itself need not be."""
        return self.check and self.source != "self"


@dataclass(frozen=True)
class Budget:
    """What a run may take or lose; one of the first three is set, the others are None.

    bits: a quantized weight, all metadata counted; nbytes: of all weights of the result, dense ones too; kl: nats a
    token. formats: the candidates. sensitivity: how it is found out what each costs; "auto": kl where the model is
    small enough for it, else fisher, or hessian where no gradient goes through its blocks.
    """

    bits: float | None = None
    nbytes: int | None = None
    kl: float | None = None
    formats: tuple[str, ...] = FORMATS
    sensitivity: str = "auto"

    def __post_init__(self) -> None:
        """Raises PlanError for what cannot be asked for."""
        asked = {"bits a weight": self.bits, "bytes": self.nbytes, "nats": self.kl}
        given = {unit: value for unit, value in asked.items() if value is not None}
        if len(given) != 1:
            raise PlanError(f"{len(given)} budgets: give one of bits a weight, size and KL divergence")
        for unit, value in given.items():
            if not 0 < value < math.inf:
                raise PlanError(f"a budget of {value} {unit}: it must be above zero, and finite")
        if len(set(self.formats)) < 2:
            raise PlanError(f"{', '.join(self.formats) or 'no format'}: a budget needs at least two formats to mix")
        for spec in self.formats:
            formats.get(spec)
        if self.sensitivity not in SENSITIVITIES:
            raise PlanError(f"sensitivity {self.sensitivity!r} is unknown: choose one of {', '.join(SENSITIVITIES)}")


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of a result. tuning: steps of end-to-end tuning after the last block."""

    model: str
    recipe: Recipe
    calibration: Calibration | None = Calibration()
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    tuning: int = 0
    trust_remote_code: bool = False
    rotate: str = "none"  # one of rotation.MODES, or rotation.AUTO until it is known which
    budget: Budget | None = None  # the recipe then says what is kept, and the rest is chosen from the candidates

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "llmquant": __version__,
            "recipe": self.recipe.to_json(),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "rotate": self.rotate,
            "seed": self.seed,
            "device": self.device,
            "dtype": str(self.dtype),
            "tuning": self.tuning,
            "budget": None if self.budget is None else asdict(self.budget),
            "source": checkpoint.fingerprint(),
        }


@dataclass(frozen=True)
class Prepared:
    """A job whose plan has been made: everything checked, nothing yet done."""

    job: Job
    checkpoint: Checkpoint
    model: StreamedModel
    plan: Plan
    length: int
    rotation: dict[str, Any] | None = None  # how it was chosen, if that was left open
    offload: Path | None = None  # where the hidden states of calibration lie, if not in memory
    ranks: Ranks = SINGLE  # the processes that do it together


def loading(job: Job) -> dict[str, Any]:
    """How a StreamedModel of the job is made, whatever its type."""
    return {"device": job.device, "trust_remote_code": job.trust_remote_code}
