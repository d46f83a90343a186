"""How the scripts here end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llmquant.errors import LlmquantError


def as_command(main: Callable[[], None]) -> None:
    """Run it: a known failure is one line and its exit code."""
    try:
        main()
    except LlmquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
