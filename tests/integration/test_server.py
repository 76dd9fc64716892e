"""The whole server from outside: its own process, its own worker, a real client, and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oracle import Oracle, make_adapter
from served import Served, until

from hatrack.manifest import file_sha256
from hatrack_client import Client, Delta, Generation, NotFound, Unauthenticated, Unavailable

PROMPT = list(range(30, 60))
SHORT = {"token_ids": PROMPT, "temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
ENDLESS = {**SHORT, "max_tokens": 450}


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = Oracle(tiny_llama, quantization="nf4", dtype=torch.bfloat16, packed=False).base
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(base, folder / f"a{i}", seed=i, r=r, lora_alpha=2 * r, target_modules=t)
        for i, (r, t) in enumerate([(4, ["q_proj", "v_proj"]), (8, "all-linear"), (64, ["k_proj", "down_proj"])])
    ]


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tiny_llama, tmp_path_factory.mktemp("served") / "data") as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    until(lambda: healthy(server))
    with Client(server.address) as connected:
        yield connected


def healthy(server: Served) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def stored(data_dir: Path) -> set[str]:
    """Digests of the artifacts in a data directory; asserts that nothing is being staged."""
    assert not list((data_dir / "staging").iterdir())
    return {path.name for path in (data_dir / "artifacts").iterdir()}


def test_one_batch_holds_all_adapters_and_each_answers_as_alone(
    server: Served, client: Client, adapters: list[Path]
) -> None:
    for i, folder in enumerate(adapters):
        client.push_adapter(f"mixed-{i}", folder)
    names = ["", "mixed-0", "mixed-1", "mixed-2"]
    alone = [client.generate(adapter=name, **SHORT).token_ids for name in names]
    assert len({tuple(ids) for ids in alone}) == len(names)
    before = server.metrics()
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: client.generate(adapter=names[i % 4], **SHORT), range(16)))
    after = server.metrics()
    for i, answer in enumerate(together):
        # bfloat16 rounds by the batch's size; exactness is held in float32 elsewhere.
        assert answer.token_ids[0] == alone[i % 4][0]
        assert (answer.adapter, answer.version) == (names[i % 4], 1 if i % 4 else 0)
    mixed = 'hatrack_step_adapters_bucket{le="1.0"}'
    steps = after["hatrack_step_adapters_count"] - before["hatrack_step_adapters_count"]
    assert after[mixed] - before[mixed] < steps, "no step held several adapters"


def test_a_replaced_adapter_never_answers_from_the_old_ones_cache(client: Client, adapters: list[Path]) -> None:
    request = {**SHORT, "token_ids": list(range(100, 130))}  # the same bytes may be known by another name already
    client.push_adapter("replaced", adapters[0])
    first = client.generate(adapter="replaced", **request)
    assert client.generate(adapter="replaced", **request).usage.cached_tokens > 0
    client.push_adapter("replaced", adapters[1])
    second = client.generate(adapter="replaced", **request)
    assert (second.version, second.usage.cached_tokens) == (2, 0)
    assert second.token_ids != first.token_ids
    client.rollback("replaced")
    again = client.generate(adapter="replaced", **request)
    assert (again.version, again.digest, again.token_ids) == (1, first.digest, first.token_ids)
    assert client.generate(adapter="replaced@2", **request).digest == second.digest


def test_delete_drains(server: Served, client: Client, adapters: list[Path], tmp_path: Path) -> None:
    pushed = client.push_adapter("doomed", adapters[2])
    stream = client.stream(adapter="doomed", **ENDLESS)
    assert isinstance(next(stream), Delta)
    client.delete_adapter("doomed")
    with pytest.raises(NotFound):
        client.generate(adapter="doomed", **SHORT)
    last = [*stream][-1]
    assert isinstance(last, Generation)
    assert last.usage.completion_tokens == ENDLESS["max_tokens"]
    assert last.digest == pushed.versions[0].digest


def test_a_closed_stream_frees_its_row(server: Served, client: Client) -> None:
    with client.stream(**ENDLESS) as stream:
        next(stream)
    until(lambda: server.metrics()["hatrack_requests_running"] == 0)
    assert server.metrics()["hatrack_kv_blocks_used"] == 0


def test_a_killed_worker_is_unavailable_then_back_with_every_adapter(
    server: Served, client: Client, adapters: list[Path]
) -> None:
    client.push_adapter("survivor", adapters[1])
    client.push_adapter("never-asked", adapters[2])
    # Of a prompt that no test before has put into the prefix cache, as after the restart: cached tokens are equal to a
    # rounding only, which decides between near ties.
    fresh = SHORT | {"token_ids": PROMPT[::-1]}
    expected = client.generate(adapter="survivor", **fresh).token_ids
    stream = client.stream(adapter="survivor", **ENDLESS)
    next(stream)
    server.kill_worker()
    with pytest.raises(Unavailable):
        list(stream)
    until(lambda: not healthy(server))
    with pytest.raises(Unavailable):
        client.generate(**SHORT)
    until(lambda: healthy(server))
    assert client.generate(adapter="survivor", **fresh).token_ids == expected
    assert client.generate(adapter="never-asked", **SHORT).version == 1
    assert server.metrics()["hatrack_worker_restarts_total"] == 1


def test_kill_9_around_an_acknowledgement(tiny_llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Uploads run while the server is killed: what was acknowledged is there afterwards, and nothing else."""
    data_dir = tmp_path / "data"
    acknowledged: list[tuple[str, str]] = []

    def push_on(address: str) -> None:
        with Client(address) as client:
            for n in range(1000):
                try:
                    pushed = client.push_adapter(f"n{n}", adapters[n % 3])
                except Unavailable:
                    return
                acknowledged.append((pushed.name, pushed.versions[0].digest))

    with Served(tiny_llama, data_dir) as served:
        pusher = threading.Thread(target=push_on, args=(served.address,))
        pusher.start()
        until(lambda: len(acknowledged) >= 5)
        served.kill()
        pusher.join(30)
    with Served(tiny_llama, data_dir) as served, Client(served.address) as client:
        found = {adapter.name: adapter.versions[0].digest for adapter in client.list_adapters()}
        assert found.items() >= dict(acknowledged).items()
        assert len(found) <= len(acknowledged) + 1  # one may have been durable, its acknowledgement on the way
        assert stored(data_dir) == set(found.values())
        for name, digest in acknowledged[:3]:
            assert client.generate(adapter=name, **SHORT).digest == digest
        weights = {file_sha256(path) for path in (data_dir / "artifacts").glob("*/adapter_model.safetensors")}
        assert weights <= {file_sha256(folder / "adapter_model.safetensors") for folder in adapters}

        # The same server drains on SIGTERM: what runs is finished, and the exit status says that all is well.
        stream = client.stream(**ENDLESS)
        next(stream)
        os.killpg(served.process.pid, signal.SIGTERM)  # as service managers send it: to the engine's process, too
        assert isinstance([*stream][-1], Generation)
        assert served.process.wait(30) == 0


def test_tenants_never_meet(tiny_llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    alice, bob = (
        subprocess.run(
            [sys.executable, "-m", "hatrack_client", "keys", "create", tenant, "--data-dir", str(data_dir)],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for tenant in ("alice", "bob")
    )  # fmt: skip
    with Served(tiny_llama, data_dir, "--host", "127.0.0.1") as served:
        with Client(served.address, api_key=alice) as first, Client(served.address, api_key=bob) as second:
            first.push_adapter("secret", adapters[0])
            answer = first.generate(adapter="secret", **SHORT)
            assert first.generate(adapter="secret", **SHORT).usage.cached_tokens > 0
            for name in ("secret", "absent"):
                with pytest.raises(NotFound) as refused:
                    second.generate(adapter=name, **SHORT)
                assert str(refused.value).replace(name, "NAME") == "adapter 'NAME' was not found"
            second.push_adapter("mine", adapters[0])  # the same bytes: stored once, cached apart
            assert second.generate(adapter="mine", **SHORT).usage.cached_tokens == 0
            assert len(stored(data_dir)) == 1
            first.delete_adapter("secret")
            assert second.generate(adapter="mine", **SHORT).token_ids == answer.token_ids
        with Client(served.address) as nobody, pytest.raises(Unauthenticated):
            nobody.generate(**SHORT)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "BASE", "--host", "0.0.0.0"], "loopback"),
        (["--model", "BASE", "--host", "0.0.0.0", "--insecure"], "key"),
        (["--model", "BASE", "--kv-cache-gb", "-1"], "kv-cache-gb"),
    ],
)
def test_a_start_that_cannot_be_is_one_sentence(
    options: list[str], sentence: str, tiny_llama: Path, tmp_path: Path
) -> None:
    options = [str(tiny_llama) if option == "BASE" else option for option in options]
    command = [sys.executable, "-m", "hatrack_client", "serve", *options, "--port", "0", "--metrics-port", "0"]
    start = time.monotonic()
    done = subprocess.run([*command, "--data-dir", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert time.monotonic() - start < 30
