from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hatrack_server.kernels.native import Native, native


@pytest.fixture
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("no C compiler with OpenMP")
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where a kernel's threads could get ahead of each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
