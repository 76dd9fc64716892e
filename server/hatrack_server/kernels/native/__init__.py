"""Kernels in C for the CPU, compiled for this very machine when they are first asked for.

Where there is no C compiler that knows OpenMP, or none of its code can be kept, callers go on without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch  # its OpenMP runtime must be in the process first: ours is then the same, with the same threads
from torch import Tensor

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
COMPILER = "cc"
FLAGS = ("-std=c11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 60

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "add_low_rank": [_POINTER, _INT, _POINTER, _INT, *[_POINTER] * 3, *[_INT] * 4, _POINTER],
    "nf4_product": [_POINTER, _INT, *[_POINTER] * 4, *[_INT] * 3],
    "unpack_nf4": [*[_POINTER] * 4, *[_INT] * 2],
}


class Native:
    """The compiled library. Its functions trust their arguments; all run on torch's threads, without the GIL.

    has_tiles: whether `nf4_product` can be used, for which the processor must have AMX.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when it can't be loaded."""
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self.has_tiles = bool(library.request_nf4_product())
        self._add_low_rank = library.add_low_rank
        self._nf4_product = library.nf4_product
        self._unpack_nf4 = library.unpack_nf4

    def add_low_rank(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> None:
        """y[T, out] += (x[T, in] a[rows[t]]ᵀ) b[rows[t]] in place: bfloat16, rows int32 [T].

        a[R, r, in] and b[R, r, out] are contiguous, and so is each token of y and x, which may be the same tensor.
        """
        assert y.stride(1) == x.stride(1) == 1
        _, rank, width = a.shape
        v = torch.empty(len(rows) * rank)
        self._add_low_rank(
            y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), a.data_ptr(), b.data_ptr(), rows.data_ptr(),
            len(rows), rank, width, b.shape[2], v.data_ptr(),
        )  # fmt: skip

    def nf4_product(self, x: Tensor, packed: Tensor, scales: Tensor, code: Tensor) -> Tensor:
        """x[T, k] times the weight: bfloat16 [T, n], given x in bfloat16, and the weight as `unpack_nf4` takes it."""
        assert x.stride(1) == 1
        (tokens, k), n = x.shape, packed.shape[0]
        y = torch.empty(tokens, n, dtype=torch.bfloat16)
        self._nf4_product(
            x.data_ptr(), x.stride(0), packed.data_ptr(), scales.data_ptr(), code.data_ptr(), y.data_ptr(), tokens, n, k
        )
        return y

    def unpack_nf4(self, packed: Tensor, scales: Tensor, code: Tensor, out: Tensor) -> None:
        """Overwrites out[n, k], bfloat16, with packed[n, k/2] uint8, scales[k/64, n] bfloat16 and code[16] float32."""
        self._unpack_nf4(packed.data_ptr(), scales.data_ptr(), code.data_ptr(), out.data_ptr(), *out.shape)


@functools.cache
def native() -> Native | None:
    """The library, compiled unless an earlier process has; None where that can't be done."""
    try:
        return Native(_compiled())
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no C kernels: steps take longer on the CPU (%s)", error)
        return None


def _compiled() -> Path:
    """Where the library lies, for these sources, this compiler and this processor."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hatrack"
    path = cache / f"kernels-{_fingerprint()}.so"
    if not path.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder, path.name)
            command: list[str | Path] = [COMPILER, *FLAGS, *sorted(HERE.glob("*.c")), "-o", made]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)  # noqa: S603
            made.replace(path)  # at once: another process may be looking
    return path


def _fingerprint() -> str:
    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True, timeout=COMPILE_SECONDS).stdout  # noqa: S603
    sources = [file.read_bytes() for file in sorted(HERE.glob("*.[ch]"))]
    parts = [version, " ".join(FLAGS).encode(), _processor(), *sources]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What tells processors with different instructions apart, where a home folder is shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()
