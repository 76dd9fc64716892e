"""The engine as the front process sees it: a supervised child process behind async streams. No torch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from hatrack_server.config import EngineConfig
from hatrack_server.engine.messages import (
    DEADLINE_ERROR,
    Cancel,
    Forget,
    Preload,
    Progress,
    Ready,
    Refused,
    Stepped,
    Stop,
    Submit,
    ToFront,
    ToWorker,
)
from hatrack_server.engine.outbox import Outbox
from hatrack_server.errors import DeadlinePassed, GenerationFailed, HatrackError, Overloaded, StartupError, Unavailable
from hatrack_server.types import Artifact, BaseInfo, Delta, EngineStats, Generation, Sampling

logger = logging.getLogger(__name__)

# A worker that has work reports every step and load. After so long without a word it counts as not ready, then as hung:
STALL_SECONDS = 60.0
HUNG_SECONDS = 600.0  # more than any step takes, since its generations are lost
RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # pauses before restarts in a row; the last one repeats
STOP_SECONDS = 10.0
REMEMBERED_PROGRAMS = 64  # that a new worker loads before anybody asks for them


class EngineClient:
    """Starts the worker, restarts it when it dies, and hands its deltas to whoever waits for them.

    All methods are called from one event loop. When the worker dies or hangs, every generation in flight ends at once
    with Unavailable; it is started again with the programs that were in use.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_stats: Callable[[EngineStats], None] = lambda _: None,
        on_progress: Callable[[str, float], None] = lambda *_: None,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._on_stats = on_stats
        self._on_progress = on_progress
        self._on_restart = on_restart
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._programs: dict[str, Artifact] = {}  # that have worked, the least recently used first
        self._worker: _WorkerProcess | None = None
        self._base: BaseInfo | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._last_word = 0.0
        self._loaded = False  # whether the latest worker got as far as loading the base

    @property
    def base(self) -> BaseInfo:
        """The base that is served, also while the worker starts anew; raises Unavailable until it was first loaded."""
        if self._base is None:
            raise Unavailable("the engine is starting")
        return self._base

    @property
    def in_flight(self) -> int:
        """Generations that the worker has not ended."""
        return len(self._streams)

    @property
    def ready(self) -> bool:
        """Whether the worker lives with its base loaded, and makes progress while there is work."""
        return self._loaded and self._worker is not None and self._silence < STALL_SECONDS

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._worker.pid if self._worker else None

    async def start(self) -> BaseInfo:
        """Starts the worker and waits until the base is loaded.

        Raises StartupError when it can't be served, Unavailable when the worker dies over it.
        """
        first: asyncio.Future[BaseInfo] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(first))
        return await first

    async def stop(self) -> None:
        """Stops the worker; generations in flight end with Unavailable."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None

    async def generate(
        self,
        *,
        tenant: str,
        salt: bytes,
        artifact: Artifact | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        deadline: float | None = None,
        trial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Yields deltas until one carries `finish`; closing the iterator cancels the generation.

        Steps that come while the consumer is busy are joined into one delta. Raises Overloaded when the queue is full,
        Unavailable when the worker is not there or dies, DeadlinePassed, and GenerationFailed for this one alone. The
        artifact of a `trial` is not loaded again by a new worker: it lies where it won't stay.
        """
        worker = self._ready_worker()
        generation = Generation(next(self._ids), tenant, salt, artifact, prompt, sampling, deadline)
        stream = self._streams[generation.id] = _Stream()
        if len(self._streams) == 1:
            self._last_word = time.monotonic()
        worker.send(Submit(generation))
        finished = False
        try:
            while not finished:
                delta = await stream.take()
                finished = delta.finish is not None
                if delta.error is not None:
                    raise _error(delta.error)
                if artifact and not trial:
                    self._remember(artifact)
                yield delta
        finally:
            self._streams.pop(generation.id, None)
            if not finished and self._worker is worker:
                worker.send(Cancel(generation.id))

    def forget(self, digest: str) -> None:
        """Frees an artifact's program at its last use: nothing names it any more."""
        self._programs.pop(digest, None)
        if self._worker:
            self._worker.send(Forget(digest))

    def _remember(self, artifact: Artifact) -> None:
        """Keeps a program that has worked for the next worker; one that may have killed this one is not among them."""
        self._programs.pop(artifact.digest, None)
        self._programs[artifact.digest] = artifact
        if len(self._programs) > REMEMBERED_PROGRAMS:
            del self._programs[next(iter(self._programs))]

    def _ready_worker(self) -> _WorkerProcess:
        if self._worker is None or not self._loaded:
            raise Unavailable("the engine is starting")
        if len(self._streams) >= self._config.max_waiting + self._config.max_rows:
            raise Overloaded("the queue is full", retry_after=1.0)
        return self._worker

    async def _supervise(self, first: asyncio.Future[BaseInfo]) -> None:
        """Keeps one worker running; the first one's fate goes to `first`."""
        failures = 0  # in a row
        while True:
            self._loaded = False
            error: HatrackError
            try:
                refusal = await self._run_one(first)
                error = StartupError(refusal) if refusal else Unavailable("the engine's process died")
            except Exception as failure:  # e.g. no memory for another process: the next attempt may find some
                logger.exception("the engine's process can't be run")
                error = Unavailable(f"the engine's process can't be run: {failure}")
            if not first.done():
                first.set_exception(error)
            if first.exception():
                return
            logger.error("%s; starting it again", error.message)
            self._on_restart()
            failures = 0 if self._loaded else failures + 1
            await asyncio.sleep(RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)])

    async def _run_one(self, first: asyncio.Future[BaseInfo]) -> str | None:
        """Runs one worker to its end; returns why it refused to start, if it did."""
        messages: asyncio.Queue[ToFront | None] = asyncio.Queue()
        worker = self._worker = _WorkerProcess(self._config, messages)
        try:
            while (message := await self._next_word(worker, messages)) is not None:
                self._last_word = time.monotonic()
                match message:
                    case Progress(stage, fraction):
                        self._on_progress(stage, fraction)
                    case Ready(base):
                        self._base = base
                        self._loaded = True
                        for artifact in self._programs.values():
                            worker.send(Preload(artifact))
                        if not first.done():
                            first.set_result(base)
                    case Refused(reason):
                        return reason
                    case Stepped(deltas, stats):
                        self._deliver(deltas)
                        self._on_stats(stats)
            return None
        finally:
            self._worker = None
            for stream in self._streams.values():
                stream.break_off()
            self._streams.clear()  # what their readers still have to read is no work of the next worker
            await asyncio.to_thread(worker.stop)

    async def _next_word(self, worker: _WorkerProcess, messages: asyncio.Queue[ToFront | None]) -> ToFront | None:
        """What the worker says next; None when it is dead, killed if it hangs over its work."""
        while True:
            try:
                return await asyncio.wait_for(messages.get(), HUNG_SECONDS)
            except TimeoutError:
                if self._silence >= HUNG_SECONDS:
                    logger.error("the engine's process hangs, and is killed")
                    worker.kill()

    @property
    def _silence(self) -> float:
        """Seconds since the worker's last word; 0 while it has no work."""
        return time.monotonic() - self._last_word if self._streams else 0.0

    def _deliver(self, deltas: tuple[Delta, ...]) -> None:
        for delta in deltas:
            # What has ended is its reader's alone: one that doesn't read is no work in progress.
            stream = self._streams.pop(delta.id, None) if delta.finish else self._streams.get(delta.id)
            if stream:
                stream.put(delta)


class _WorkerProcess:
    """One life of the worker: the process, and a thread for each way through its pipe."""

    def __init__(self, config: EngineConfig, messages: asyncio.Queue[ToFront | None]) -> None:
        """Spawns; `messages` gets what the worker says, and None when it is dead."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_main, args=(config, theirs), name="hatrack-engine", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the pipe breaks when the worker dies
        self._outbox: Outbox[ToWorker] = Outbox(self._connection)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop, messages), name="engine-reader", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process id."""
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Queues a message; lost if the worker is dead, which its streams learn of anyway."""
        self._outbox.put(message)

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()

    def stop(self) -> None:
        """Asks the process to end, and kills it if it doesn't. Blocks."""
        self._outbox.put(Stop())
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._outbox.close()
        self._connection.close()

    def _read(self, loop: asyncio.AbstractEventLoop, messages: asyncio.Queue[ToFront | None]) -> None:
        message: ToFront | None
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = None
            try:
                loop.call_soon_threadsafe(messages.put_nowait, message)
            except RuntimeError:
                return  # the event loop has ended
            if message is None:
                return


class _Stream:
    """Deltas on their way to one consumer, joined while it is busy: never more than one generation's tokens."""

    def __init__(self) -> None:
        self._delta: Delta | None = None
        self._broken = False
        self._changed = asyncio.Event()

    def put(self, delta: Delta) -> None:
        self._delta = delta if self._delta is None else _join(self._delta, delta)
        self._changed.set()

    def break_off(self) -> None:
        self._broken = True
        self._changed.set()

    async def take(self) -> Delta:
        await self._changed.wait()
        delta, self._delta = self._delta, None
        if delta is None:
            raise Unavailable("the engine died during the generation")
        if not self._broken:
            self._changed.clear()
        return delta


def _join(first: Delta, second: Delta) -> Delta:
    return Delta(
        id=second.id,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        finish=second.finish,
        error=second.error,
        cached_tokens=first.cached_tokens,
        queue_seconds=first.queue_seconds,
    )


def _error(reason: str) -> HatrackError:
    if reason == DEADLINE_ERROR:
        return DeadlinePassed("the deadline passed before the generation ended")
    return GenerationFailed(f"the generation could not go on: {reason}")


def _main(config: EngineConfig, connection: Connection) -> None:
    """What the child runs; imported here so that the front process never imports torch."""
    from hatrack_server.engine.worker import run_worker

    run_worker(config, connection)
