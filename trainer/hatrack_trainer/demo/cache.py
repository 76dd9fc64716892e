"""What the demo has made once, kept under the digest of everything that it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def default_folder() -> Path:
    """`hatrack/demo` in the user's cache, where XDG_CACHE_HOME says or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hatrack" / "demo"


class Cache:
    """Folders that are complete or absent, so that an interrupted demo leaves nothing half made behind."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, made_from: dict[str, Any]) -> Path:
        """Where the thing lies or would lie; `made_from` must be plain JSON."""
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return self.root / f"{name}-{key[:16]}"

    def make(self, path: Path, build: Callable[[Path], None]) -> None:
        """Lets `build` fill a new folder, and moves that to `path` in one step once it is filled.

        Removes what was built if `build` raises. Another process may be first: then its folder stays.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".partial-") as temporary:
            partial = Path(temporary) / path.name
            build(partial)
            try:
                partial.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
                shutil.rmtree(partial)
