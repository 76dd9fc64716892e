"""The engine's process: alone imports torch, ends with its parent, and waits for nothing but work."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import transformers

from hatrack_server.adapters.host_tier import HostTier
from hatrack_server.adapters.pools import Pools
from hatrack_server.adapters.program import compile_artifact
from hatrack_server.adapters.slots import Load, ProgramSlots
from hatrack_server.config import EngineConfig
from hatrack_server.engine.blocks import KVBlocks
from hatrack_server.engine.graphs import DecodeGraphs
from hatrack_server.engine.messages import (
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
from hatrack_server.engine.step import Engine
from hatrack_server.errors import StartupError
from hatrack_server.logs import configure_logging
from hatrack_server.model.checkpoint import identify
from hatrack_server.model.paged import PagedModel
from hatrack_server.types import BaseInfo, Delta

Inbox = queue.SimpleQueue[ToWorker | Load]

LOAD_POLL_SECONDS = 0.05  # how often deadlines are looked at while every sequence waits for its program


def run_worker(config: EngineConfig, connection: Connection) -> None:
    """The process's main function: loads the base, then steps while there is work."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent drains, then stops us
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    transformers.utils.logging.disable_progress_bar()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), name="reader", daemon=True).start()
    outbox: Outbox[ToFront] = Outbox(connection)
    try:
        worker = Worker(config, inbox, outbox)
    except StartupError as error:
        outbox.put(Refused(error.message))
    else:
        worker.run()
    outbox.close()


def build_engine(config: EngineConfig, model: PagedModel, base: BaseInfo, loads: Inbox) -> Engine:
    """Puts the engine together; finished loads go to `loads`."""
    pools = Pools(model.dtype, model.device, int(config.adapter_gb * 1e9))
    host = HostTier(int(config.host_adapter_gb * 1e9), pinned=model.device.type == "cuda")
    slots = ProgramSlots(pools, host, lambda artifact: compile_artifact(artifact, model.layers), loads.put)
    identity = base.identity
    fingerprint = f"{identity.weights}:{identity.quantization}"
    blocks = KVBlocks(
        base.kv_tokens // config.block_size, config.block_size, fingerprint, prefix_cache=config.prefix_cache
    )
    on_gpu = model.device.type == "cuda"
    return Engine(
        model,
        slots,
        blocks,
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        ahead=on_gpu if config.async_scheduling is None else config.async_scheduling,
        graphs=DecodeGraphs(model) if on_gpu and config.cuda_graphs else None,
    )


def describe_base(config: EngineConfig, model: PagedModel) -> BaseInfo:
    """What the front process is told of the loaded base. Reads the checkpoint's files once, for their digests."""
    kv_tokens = model.kv_slots - config.block_size
    longest = min(model.max_position, kv_tokens)
    if config.max_model_len is not None and config.max_model_len > longest:
        raise StartupError(
            f"max_model_len: {config.max_model_len} is more than {longest}, the lesser of the checkpoint's "
            f"{model.max_position} positions and the KV cache's {kv_tokens} tokens"
        )
    adapter_bytes = int(config.adapter_gb * 1e9)
    return BaseInfo(
        identity=identify(config.model, config.quantization),
        architecture=model.architecture,
        shapes=model.layers.shapes,
        vocab_size=model.config.vocab_size,
        max_model_len=config.max_model_len or longest,
        kv_tokens=kv_tokens,
        eos_token_ids=model.eos_token_ids,
        memory={
            **model.memory(),
            "adapters, at most": adapter_bytes,
            "evicted adapters, at most": int(config.host_adapter_gb * 1e9),
        },
        adapter_bytes=adapter_bytes,
        device=str(model.device),
    )


class Worker:
    """The engine with its mail: whatever other threads have for it comes through the inbox."""

    def __init__(self, config: EngineConfig, inbox: Inbox, outbox: Outbox[ToFront]) -> None:
        """Loads the base; raises StartupError when it can't be served."""
        if config.threads:
            torch.set_num_threads(config.threads)
        self._inbox = inbox
        self._outbox = outbox
        model = PagedModel(config, lambda stage, fraction: outbox.put(Progress(stage, fraction)))
        outbox.put(Progress("reading digests", 0.9))
        base = describe_base(config, model)
        self._on_cpu = model.device.type == "cpu"
        self._engine = build_engine(config, model, base, inbox)
        # Python's collector would look through all that the base and its libraries are made of, again and again, and
        # each time hold up a step for a third of a second. They stay, so it need not.
        gc.collect()
        gc.freeze()
        outbox.put(Ready(base))

    def run(self) -> None:
        """Steps until told to stop; blocks only while no sequence can run."""
        goes_on = False
        while True:
            deltas: list[Delta] = []
            loads: list[float] = []
            heard = False
            for message in self._mail(goes_on=goes_on):
                heard = True
                match message:
                    case Stop():
                        self._engine.slots.close()
                        return
                    case Submit(generation):
                        self._engine.submit(generation)
                    case Cancel(generation_id):
                        self._engine.cancel(generation_id)
                    case Preload(artifact):
                        self._engine.slots.preload(artifact)
                    case Forget(digest):
                        self._engine.slots.forget(digest)
                    case Load(_, seconds, None):
                        loads.append(seconds)
                    case Load(artifact, _, str(error)):
                        deltas += self._engine.load_failed(artifact, error)
            before = self._engine.steps
            deltas += self._engine.step()
            stepped = self._engine.steps > before
            goes_on = stepped or bool(deltas)  # what a sequence that has ended leaves may be for another
            # A GPU's steps leave the cores alone.
            self._engine.slots.beside_steps = self._on_cpu and bool(self._engine.scheduler.running)
            if heard or stepped or deltas:  # silence tells the front process that nothing gets on
                stats = replace(self._engine.stats(stepped=stepped), adapter_loads=tuple(loads))
                self._outbox.put(Stepped(tuple(deltas), stats))

    def _mail(self, *, goes_on: bool) -> Iterator[ToWorker | Load]:
        """What has come; waits for it unless the next step may have work without it."""
        if not goes_on:
            try:
                yield self._inbox.get(timeout=LOAD_POLL_SECONDS if self._engine.has_work else None)
            except queue.Empty:
                return
        while not self._inbox.empty():
            yield self._inbox.get_nowait()


def _read(connection: Connection, inbox: Inbox) -> None:
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)  # the parent died: nobody is left to answer
