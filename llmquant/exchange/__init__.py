"""Files of other tools: what llmquant writes for them, and what it reads of theirs."""
