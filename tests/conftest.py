"""Session-wide fixtures: few threads, and tiny checkpoints made once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports a library that reads them.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest


@pytest.fixture(autouse=True)
def no_silence_behind() -> Iterator[None]:
    """`hatrack adapters inspect` silences its process's warnings; here other tests follow in the same one."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a tokenizer and a chat template."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama")
