"""`python -m llmquant`, as torchrun calls it."""

from __future__ import annotations

from llmquant.cli import main

main()
