"""Every error a user can meet, one tree. Each carries the exit code with which the command line ends.

    LlmquantError
    ├── CheckpointError      3  the model cannot be read: not a checkpoint, pickles only, truncated, missing pieces
    │   └── NonFiniteInput   3  a weight holds NaN or Inf
    ├── PlanError            4  the request cannot be met: unknown format or model, group larger than the row
    │   └── ScaleOverflow    4  a scale does not fit its stored type
    ├── OutputError          5  the output folder cannot be used: not writable, full, something else's
    ├── DataError            6  calibration or evaluation text cannot be used: empty, too short, unreadable
    ├── VerificationError    7  what was read back is not what was written, or a loaded folder is incomplete
    └── RankError            9  another process of the same job is gone

0 is success, 1 an unexpected failure (a bug: please report it), 2 a wrong command line, 8 success with recoveries
(recovery.py), 130 an interrupt.
"""

from __future__ import annotations


class LlmquantError(ValueError):
    """A failure with a known cause. The message says what is wrong, where, and what to do about it."""

    exit_code = 1


class CheckpointError(LlmquantError):
    exit_code = 3


class NonFiniteInput(CheckpointError):
    """A tensor that must be finite holds NaN or Inf."""


class PlanError(LlmquantError):
    exit_code = 4


class ScaleOverflow(PlanError):
    """A scale is too large for the type it is stored in."""


class OutputError(LlmquantError):
    exit_code = 5


class DataError(LlmquantError):
    exit_code = 6


class VerificationError(LlmquantError):
    exit_code = 7


class RankError(LlmquantError):
    exit_code = 9
