"""The artifacts' files on disk: `artifacts/<digest>/`, each written once, and `staging/` for what is on its way.

A directory appears under `artifacts/` by one rename, after its files are on disk; it goes the same way back. So at
every moment what is there is whole, and what a crash leaves over lies in `staging/` or is named by nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Set as AbstractSet
from pathlib import Path

from hatrack.manifest import ARTIFACT_FILES


class Store:
    """Content-addressed directories under `root`. Not locked: the catalog calls it under its own lock."""

    def __init__(self, root: Path) -> None:
        self._artifacts = root / "artifacts"
        self._staging = root / "staging"
        for directory in (self._artifacts, self._staging):
            directory.mkdir(mode=0o700, exist_ok=True)
        sync_directory(root)

    def path(self, digest: str) -> Path:
        """Where the artifact lies, if it is stored."""
        return self._artifacts / digest

    def new_staging(self) -> Path:
        """A fresh directory for one upload."""
        path = self._staging / secrets.token_hex(16)
        path.mkdir(mode=0o700)
        return path

    def adopt(self, staged: Path, digest: str) -> None:
        """Moves a staged artifact, whose files are synced, into the store: on disk before this returns.

        Only the artifact's own files are kept; `staged` is left alone when the store has this digest already.
        """
        if self.path(digest).exists():
            return
        for file in staged.iterdir():
            if file.name not in ARTIFACT_FILES:
                file.unlink()
        sync_directory(staged)
        staged.rename(self.path(digest))
        sync_directory(self._artifacts)

    def retire(self, digest: str) -> Path:
        """Takes an artifact out of the store in one step; returns a directory for the caller to remove."""
        retired = self._staging / secrets.token_hex(16)
        self.path(digest).rename(retired)
        return retired

    def sweep(self, named: AbstractSet[str]) -> None:
        """Removes everything staged, and every artifact that isn't `named`: what an earlier run left over."""
        leftovers = [path for path in self._artifacts.iterdir() if path.name not in named]
        for path in (*leftovers, *self._staging.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def sync_directory(path: Path) -> None:
    """Puts a directory's entries on disk: a file's own fsync doesn't cover its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
