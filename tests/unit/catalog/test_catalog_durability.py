"""`kill -9` at any moment: what was acknowledged is there, and nothing else is left over."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loras import BASE, CHECKED, digest_of, lora_files, stored_digests, upload

from hatrack_server.catalog import Catalog

TESTS = Path(__file__).parents[2]
FIRST_ACKNOWLEDGED = 3  # enough to know that the child is in its loop


def commit_for_ever(data_dir: Path, first_seed: int) -> None:
    """The child: acknowledges each commit by a line, and deletes every third name again."""
    catalog = Catalog(data_dir, max_upload_bytes=1_000_000)
    seed = first_seed
    while True:
        record = catalog.commit(upload(catalog, f"a{seed}", lora_files(seed=seed)), CHECKED, BASE.identity)
        print(record.name, record.versions[0].digest, flush=True)  # noqa: T201
        if seed % 3 == 0:
            print(f"-{record.name}", flush=True)  # noqa: T201
            catalog.delete("default", record.name)
        seed += 1


def run_and_kill(data_dir: Path, first_seed: int, delay: float) -> tuple[dict[str, str], set[str]]:
    """What the child acknowledged before SIGKILL, and the names that it had begun to delete."""
    code = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_catalog_durability import commit_for_ever\n"
        f"commit_for_ever(Path({str(data_dir)!r}), {first_seed})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(FIRST_ACKNOWLEDGED)]
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    # The kill may cut the last line: then it was not acknowledged.
    whole = [line.split() for line in lines if line.endswith("\n")]
    deleted = {line[0][1:] for line in whole if line[0].startswith("-")}
    return {line[0]: line[1] for line in whole if len(line) == 2}, deleted


@pytest.mark.parametrize("seed", range(6))
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, seed: int) -> None:
    acknowledged: dict[str, str] = {}
    deleted: set[str] = set()
    chance = random.Random(seed)
    for first in (0, 1000):
        names, gone = run_and_kill(tmp_path, first, chance.uniform(0, 0.05))
        acknowledged |= names
        deleted |= gone
    assert len(acknowledged) >= FIRST_ACKNOWLEDGED - 1
    catalog = Catalog(tmp_path, max_upload_bytes=1_000_000)
    page, _ = catalog.list("default", page_size=1000, page_token="")
    named = {record.name: record.versions[0].digest for record in page}
    # One commit per life may have become durable just before its acknowledgement.
    assert acknowledged.keys() - deleted <= named.keys()
    assert len(named.keys() - acknowledged.keys()) <= 2
    assert all(named[name] == digest for name, digest in acknowledged.items() if name in named)
    assert stored_digests(tmp_path) == set(named.values())
    catalog.close()


def test_what_a_crash_leaves_between_two_steps_is_swept(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, max_upload_bytes=1_000_000)
    catalog.commit(upload(catalog, "kept", lora_files(seed=1)), CHECKED, BASE.identity)
    catalog.close()
    # Renamed into the store, but not named yet; half an upload; a stray file.
    orphan = tmp_path / "artifacts" / digest_of(lora_files(seed=2))
    orphan.mkdir()
    (orphan / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "staging" / "half").mkdir()
    (tmp_path / "staging" / "stray").touch()
    Catalog(tmp_path, max_upload_bytes=1_000_000).close()
    assert stored_digests(tmp_path) == {digest_of(lora_files(seed=1))}


def test_everything_is_synced_before_the_acknowledgement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kill can show, because the kernel lives on: only a loss of power would."""
    catalog = Catalog(tmp_path, max_upload_bytes=1_000_000)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    files = lora_files()
    staged = upload(catalog, "tone", files)
    assert staged.artifact is not None
    directory = staged.artifact.path.name
    catalog.commit(staged, CHECKED, BASE.identity)
    catalog.close()
    wanted = [*(("sync", name) for name in files), ("sync", directory), ("rename", directory), ("sync", "artifacts")]
    assert [event for event in events if event in wanted] == wanted
