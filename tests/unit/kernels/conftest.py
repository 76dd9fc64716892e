from __future__ import annotations

import pytest

from hatrack_server.kernels.native import Native, native


@pytest.fixture
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("no C compiler with OpenMP")
    return found
