"""Session-wide fixtures: few threads, and tiny checkpoints made once."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports a library that reads them.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a tokenizer and a chat template."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama")
