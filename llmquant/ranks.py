"""Many processes at one job: who does what, and what they tell each other. Only this file knows torch.distributed.

torchrun starts them. Every process goes through the same plan with the same weights; the windows of calibration, the
rows of its sums and the matrices of a block are shared out, and what each finds is sent to all, so that all decide
alike. The first process alone reads and writes the output folder. No sum depends on how many processes there are: each
row of it is added up by one of them, over all windows in their order.

What is sent is bytes, JSON and tensors, by gloo, or by NCCL where the device is a GPU. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from llmquant.errors import PlanError, RankError
from llmquant.stats import slabs

SECONDS = 3600.0  # that a process waits for what the others solve, unless LLMQUANT_TIMEOUT says otherwise
LOOK = 0.05  # seconds from one look to the next at whether the first process is done with what it does alone
ALIGNED = 16  # bytes, at a multiple of which every tensor begins


@dataclass(frozen=True)
class Parcel:
    """What one process tells the others: JSON values, and tensors by name."""

    facts: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Ranks:
    """The processes of a job, of which this is number `rank` of `count`; without torchrun it is the only one.

    Every process calls all methods that send something, in the same order. They raise RankError where another process
    is gone, or does not answer in time. device: where tensors come from, and arrive.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    store: Any = None
    _alone: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that has the output folder, and speaks to the user."""
        return self.rank == 0

    def shares(self, costs: Sequence[int]) -> list[int]:
        """The process of each of some jobs: the dearest first, each to the one with the least to do."""
        load, owner = [0] * self.count, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            owner[job] = load.index(min(load))
            load[owner[job]] += costs[job]
        return owner

    def each(self, own: Parcel) -> list[Parcel]:
        """What every process has, in their order."""
        return [self.sent(source, own) for source in range(self.count)]

    def interleaved(self, own: list[Any]) -> list[Any]:
        """JSON values of numbered things, of which this process has every count-th, in the order of their numbers."""
        lists = [parcel.facts for parcel in self.each(Parcel(own))]
        return [values[turn] for turn in range(max(map(len, lists))) for values in lists if turn < len(values)]

    def sent(self, source: int, own: Parcel) -> Parcel:
        """What the process `source` has; of the others, nothing is asked."""
        if self.count == 1:
            return own
        mine = source == self.rank
        header, parts = _packed(own) if mine else (b"", [])
        sizes = torch.tensor([len(header), sum(map(len, parts))], device=self.device)
        with _told():
            distributed.broadcast(sizes, source)
            text = torch.frombuffer(bytearray(header), dtype=torch.uint8) if mine else torch.empty(int(sizes[0]))
            text = text.to(self.device, torch.uint8)
            distributed.broadcast(text, source)
            body = torch.cat(parts).to(self.device) if parts else torch.empty(int(sizes[1]), dtype=torch.uint8)
            body = body.to(self.device)
            if len(body):
                distributed.broadcast(body, source)
        return own if mine else _unpacked(bytes(text.cpu().numpy()), body)

    def alone(self, work: Callable[[], Parcel]) -> Parcel:
        """What the first process finds, however long that takes; the others wait."""
        if self.count == 1:
            return work()
        self._alone += 1
        done, failed = f"llmquant/alone/{self._alone}", "llmquant/failed"
        found = Parcel()
        if self.first:
            try:
                found = work()
            except BaseException:
                self.store.set(failed, "")
                raise
            self.store.set(done, "")
        else:
            with _told():
                while not self.store.check([done]):
                    if self.store.check([failed]):
                        raise RankError("the first process has failed, and says why")
                    time.sleep(LOOK)
        return self.sent(0, found)

    def spread(self, total: Tensor) -> None:
        """To all, the rows of a sum that each has added up: see Stats.share."""
        if self.count == 1:
            return
        with _told():
            for number, rows in enumerate(slabs(len(total))):
                distributed.broadcast(total[rows], number % self.count)

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises PlanError where something is not the same for all processes: their results would not be, either."""
        wanted, *others = (parcel.facts for parcel in self.each(Parcel(facts)))
        for number, found in enumerate(others, 1):
            for key in wanted:
                if found[key] != wanted[key]:
                    raise PlanError(
                        f"process {number} has {key} = {found[key]!r}, the first one {wanted[key]!r}: start all with "
                        "the same command, packages and kind of machine"
                    )


SINGLE = Ranks()
_joined: Ranks | None = None


def join(device: str) -> Ranks:
    """The processes that torchrun has started with this one, as its environment says; on GPUs, one for each.

    Raises PlanError where there are fewer GPUs than processes on this machine.
    """
    global _joined
    if _joined is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _joined or SINGLE
    kind, local = torch.device(device), int(os.environ.get("LOCAL_RANK", "0"))
    if kind.type == "cuda":
        if kind.index is not None:
            raise PlanError(f"--device {device}: every process takes a GPU of its own: leave the number out")
        if local >= torch.cuda.device_count():
            raise PlanError(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start no more")
        torch.cuda.set_device(local)  # from here on "cuda" is this one
        kind = torch.device("cuda", local)
    wait = timedelta(seconds=float(os.environ.get("LLMQUANT_TIMEOUT", SECONDS)))
    with _told():
        store, rank, count = next(rendezvous("env://", timeout=wait))
        store.set_timeout(wait)
        distributed.init_process_group(
            "nccl" if kind.type == "cuda" else "gloo", store=store, rank=rank, world_size=count, timeout=wait
        )
    _joined = Ranks(rank, count, str(kind), store)
    return _joined


def beside() -> int:
    """How many processes of the job share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def leave() -> None:
    """At the end of a job that went well."""
    global _joined
    if _joined is not None:
        distributed.destroy_process_group()
        _joined = None


def speaks(message: str) -> bool:
    """Whether this process is the one to tell the user of a failure that several may have met."""
    if _joined is None:
        return os.environ.get("RANK", "0") == "0"
    try:
        return bool(_joined.store.add(f"llmquant/said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)
    except RuntimeError:  # with the process that kept count
        return True


@contextmanager
def _told() -> Iterator[None]:
    """Turn what torch.distributed says of other processes into one line with a remedy."""
    try:
        yield
    except RuntimeError as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise RankError(
            f"another process of the job is gone, or did not answer in time: {first}: repeat the same command, which "
            "resumes"
        ) from None


def _packed(parcel: Parcel) -> tuple[bytes, list[Tensor]]:
    """A header in JSON, and the bytes of the tensors, filled up to where the next one may begin."""
    entries: list[tuple[str, str, list[int]]] = []
    parts: list[Tensor] = []
    for name, tensor in parcel.tensors.items():
        entries.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        parts += [flat, flat.new_zeros(-len(flat) % ALIGNED)]
    return json.dumps([parcel.facts, entries]).encode(), parts


def _unpacked(header: bytes, body: Tensor) -> Parcel:
    facts, entries = json.loads(header)
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, kind, shape in entries:
        dtype: torch.dtype = getattr(torch, kind)
        stop = start + math.prod(shape) * dtype.itemsize
        tensors[name] = body[start:stop].view(dtype).view(shape)
        start = stop + -stop % ALIGNED
    return Parcel(facts, tensors)
