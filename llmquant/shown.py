"""What is shown to the model: tokens that are given, text, or what the model writes by itself."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmquant import chats, domain, sampling, text
from llmquant.errors import CheckpointError, DataError
from llmquant.estimate import device_memory
from llmquant.job import Calibration, Prepared, Progress
from llmquant.matrices import loader_of
from llmquant.output import CALIBRATION, OutputFolder
from llmquant.phases import phase


def window_length(config: PretrainedConfig, calibration: Calibration) -> int:
    """Tokens of a window: as asked, as in the tokens that are given, or as the model allows."""
    if text.holds_tokens(calibration.source):
        return text.token_length(calibration.source, config, calibration.length)
    return text.window_length(config, calibration.length or min(512, text.window_length(config)))


def mended_windows(prepared: Prepared, calibration: Calibration, progress: Progress) -> dict[str, Tensor]:
    """What calibration shows: tokens (samples, length) int64; where text was looked at, excess, how far it is from what
    the model was made for, nats a token, and own (samples,) bool, the windows that the model wrote anew for that.

    Calibrated on such text alone a model can end worse than without any; half of it in its own words, nearly as on the
    right text.
    """
    windows = asked_windows(prepared, calibration, progress)
    if not calibration.checked:
        return {"tokens": windows}
    looking = partial(progress, "look at text")
    with phase("forward", whole=True):
        found = domain.excess(prepared.model, windows, batch=calibration.batch, progress=looking)
    own = torch.zeros(len(windows), dtype=torch.bool)
    if found > domain.MOST:
        own[torch.arange(len(windows) - 1, -1, -2)] = True  # of those summed and of those held out
        what = (
            f"{calibration.source}: is not the kind of text that the model was made for: its tokens cost it "
            f"{found:.2f} nats more than it expects, and {domain.MOST} are allowed"
        )
        try:
            windows[own] = _sampled(prepared, int(own.sum()), progress)
        except DataError as error:
            raise DataError(
                f"{what}; and half of the windows cannot be the model's own samples instead: {error}; or take the text "
                "as it is with --no-calibration-check"
            ) from error
        logging.getLogger(__name__).warning(
            "%s: %d of %d windows are the model's own samples instead; give other text, or leave --calibration away",
            what,
            int(own.sum()),
            len(windows),
        )
    return {"tokens": windows, "excess": torch.tensor(found, dtype=torch.float64), "own": own}


def asked_windows(prepared: Prepared, calibration: Calibration, progress: Progress) -> Tensor:
    """Calibration tokens (samples, length) int64, as they were asked for."""
    job, folder, config = prepared.job, prepared.checkpoint.folder, prepared.model.config.get_text_config()
    if text.holds_tokens(calibration.source):
        return text.read_tokens(calibration.source, count=calibration.samples, vocabulary=config.vocab_size)
    if calibration.source != "self":
        tokenizer = text.load_tokenizer(folder, job.trust_remote_code)
        return text.calibration_windows(
            tokenizer, calibration.source, count=calibration.samples, length=prepared.length, seed=job.seed
        )
    return _sampled(prepared, calibration.samples, progress)


def kept_windows(prepared: Prepared, folder: OutputFolder, progress: Progress) -> Tensor:
    """As `asked_windows`; in a run that is taken up again, those of the first time."""
    calibration = prepared.job.calibration
    assert calibration is not None
    return folder.kept(CALIBRATION, lambda: {"tokens": asked_windows(prepared, calibration, progress)})["tokens"]


@phase("sample", whole=True)
def _sampled(prepared: Prepared, count: int, progress: Progress) -> Tensor:
    """Windows (count, length) int64 that the model writes by itself."""
    job, folder, config = prepared.job, prepared.checkpoint.folder, prepared.model.config.get_text_config()
    _check_room(prepared)
    model = loader_of(prepared.checkpoint.config()).from_pretrained(
        folder, dtype=prepared.model.dtype, trust_remote_code=job.trust_remote_code
    )
    windows = sampling.sample_windows(
        model.to(job.device).eval(),
        bos_token_id=config.bos_token_id,
        count=count,
        length=prepared.length,
        seed=job.seed,
        turns=_turns(prepared),
        progress=partial(progress, "sample"),
    )
    return windows.cpu()


def _turns(prepared: Prepared) -> chats.Turns | None:
    """How the model's conversations go; None where there is no chat template, or none that can be used."""
    folder = prepared.checkpoint.folder
    try:
        turns = chats.turns(text.load_tokenizer(folder, prepared.job.trust_remote_code))
        if turns is not None and 2 * (size := len(turns.opening) + len(turns.reply)) > prepared.length:
            raise DataError(f"{folder}: the chat template's own {size} tokens fill most of {prepared.length}")
    except (CheckpointError, DataError) as error:
        logging.getLogger(__name__).warning("%s: the model's samples are plain text, no conversations", error)
        return None
    return turns


def _check_room(prepared: Prepared) -> None:
    """The model's own samples need all of it in memory at once, which nothing else here does."""
    need = sum(prepared.checkpoint.nbytes(name) for name in prepared.checkpoint.names())
    free, _ = device_memory(prepared.model.device)
    if need > 0.9 * free:
        raise DataError(
            f"the model's own samples need all of it in memory: {need:,} bytes, {free:,} are free: give text with "
            "--calibration FILE, or use --quality fast, which needs none"
        )
