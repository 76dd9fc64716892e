from __future__ import annotations

import threading
from multiprocessing import Pipe

from hatrack_server.engine.outbox import Outbox

MANY = 2000
BIG = "x" * 1000  # together far more than a pipe holds
PATIENCE_SECONDS = 10.0


def close_in_time(outbox: Outbox[tuple[int, str]]) -> bool:
    closing = threading.Thread(target=outbox.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_SECONDS)
    return not closing.is_alive()


def test_messages_arrive_in_order_and_nobody_waits_for_the_reader() -> None:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        outbox: Outbox[tuple[int, str]] = Outbox(writer)
        for number in range(MANY):  # nobody reads yet
            outbox.put((number, BIG))
        assert [reader.recv()[0] for _ in range(MANY)] == list(range(MANY))
        assert close_in_time(outbox)


def test_closing_sends_what_is_queued() -> None:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        outbox: Outbox[tuple[int, str]] = Outbox(writer)
        outbox.put((1, ""))
        outbox.put((2, ""))
        assert close_in_time(outbox)
        assert [reader.recv(), reader.recv()] == [(1, ""), (2, "")]


def test_a_reader_that_died_holds_nobody_up() -> None:
    reader, writer = Pipe(duplex=False)
    with writer:
        outbox: Outbox[tuple[int, str]] = Outbox(writer)
        reader.close()
        for number in range(MANY):
            outbox.put((number, BIG))
        assert close_in_time(outbox)
