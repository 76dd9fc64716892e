"""The engine's loop over its mail, without a process around it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_checkpoint

from hatrack_server.config import EngineConfig
from hatrack_server.engine.messages import Stepped, Stop, Submit, ToFront
from hatrack_server.engine.worker import Inbox, Worker
from hatrack_server.types import Delta, Generation, Sampling

REQUESTS, TOKENS = 12, 3


class Deltas:
    """What the worker sends, which stops once all requests are answered."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.found: list[Delta] = []
        self._stop = stop

    def put(self, message: ToFront) -> None:
        """See Outbox."""
        if isinstance(message, Stepped):
            self.found += message.deltas
            if sum(delta.finish is not None for delta in self.found) == REQUESTS:
                self._stop()


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_nobody_waits_for_mail_while_others_could_be_admitted(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        model=make_checkpoint(tmp_path / "base"), device="cpu", kv_cache_gb=0.001, max_rows=2, async_scheduling=ahead
    )
    inbox: Inbox = queue.SimpleQueue()
    outbox = Deltas(lambda: inbox.put(Stop()))
    worker = Worker(config, inbox, outbox)  # type: ignore[arg-type]
    sampling = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for n in range(REQUESTS):
        inbox.put(Submit(Generation(n, "t", b"salt", None, (n + 1, 2, 3), sampling)))
    # A wait that is not for a first message is one for a program's load, and there is none.
    waits: list[float] = []
    get = inbox.get

    class Watched:
        empty, get_nowait, put = inbox.empty, inbox.get_nowait, inbox.put

        def get(self, timeout: float | None = None) -> object:
            if timeout is not None:
                waits.append(timeout)
            return get(timeout=timeout)

    monkeypatch.setattr(worker, "_inbox", Watched())
    worker.run()
    assert not waits
    assert sum(len(delta.tokens) for delta in outbox.found) == REQUESTS * TOKENS
