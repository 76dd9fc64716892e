"""Kernels in C for the CPU, compiled for this very machine whenever a process begins: it takes a second or two.

Where there is no C compiler that knows OpenMP and GCC's vectors, callers go on without.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch  # its OpenMP runtime must be in the process first: ours is then the same, with the same threads
from torch import Tensor

from hatrack_server.kernels.runs import Run

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
COMPILER = "cc"
FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 60

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "add_low_rank": [_POINTER, _INT, _POINTER, _INT, _POINTER, *[_INT] * 3],
    "dense_product": [_POINTER, _INT, *[_POINTER] * 2, *[_INT] * 3],
    "paged_decode": [*[_POINTER] * 6, ctypes.c_float, *[_INT] * 6],
    "nf4_product": [*[_POINTER] * 5, *[_INT] * 4, _POINTER, _INT],
    "rms_norm": [*[_POINTER] * 3, ctypes.c_float, *[_INT] * 2],
}


class _LowRankSum(ctypes.Structure):
    """As low_rank.h has it."""

    _fields_ = (
        *((name, _POINTER) for name in ("a", "b", "rows", "v")),
        *((name, _INT) for name in ("start", "count", "length", "rank")),
    )


class LowRankSums:
    """y[t, out] += (x[t, in] a[row]ᵀ) b[row] in place, for the tokens t of runs and their rows; what doesn't change
    while a batch lives is looked up and checked once. Not for two threads at a time.

    pointer: to an array of `length`, in which C finds them.
    """

    def __init__(self, function: Callable[..., None], a: Tensor, b: Tensor, runs: Sequence[Run]) -> None:
        (_, rank, width), out = a.shape, b.shape[2]
        _require(
            b.shape[1] == rank  # either may have more rows behind those that are taken
            and a.dtype is b.dtype is torch.bfloat16
            and a.is_contiguous()
            and b.is_contiguous()
            and all(run.start >= 0 for run in runs)
        )
        self._function = function
        self._width, self._out = width, out
        self._stop = max((run.stop for run in runs), default=0)
        numbers = [run.row_numbers for run in runs]
        between = [torch.empty(len(run.rows) * run.length * rank, dtype=torch.float32) for run in runs]
        self._array = (_LowRankSum * len(runs))(
            *(
                _LowRankSum(
                    a.data_ptr(), b.data_ptr(), rows.data_ptr(), v.data_ptr(), run.start, len(rows), run.length, rank
                )
                for run, rows, v in zip(runs, numbers, between, strict=True)
            )
        )
        self._tensors = a, b, numbers, between  # whose memory lives as long as this
        self.pointer, self.length = ctypes.addressof(self._array), len(runs)

    def __call__(self, y: Tensor, x: Tensor) -> None:
        """bfloat16. Each token of y[T, out] and x[T, in], which may be the same tensor, is contiguous."""
        (tokens, width), (y_stride, y_step), (x_stride, x_step) = x.shape, y.stride(), x.stride()
        _require(y_step == x_step == 1 and len(y) == tokens and self.fit(tokens, width, y.shape[1]))
        self._function(
            y.data_ptr(), y_stride, x.data_ptr(), x_stride, self.pointer, self.length, self._width, self._out
        )

    def fit(self, tokens: int, width: int, out: int) -> bool:
        """Whether x[tokens, width] and y[tokens, out] are what they are for."""
        return width == self._width and out == self._out and self._stop <= tokens


class NF4Product:
    """x times one weight; what doesn't change from call to call is looked up and checked once."""

    def __init__(self, function: Callable[..., None], weight: tuple[Tensor, Tensor, Tensor], *, tiles: bool) -> None:
        packed, scales, code = weight
        n, k = packed.shape[0], packed.shape[1] * 2
        _require(
            n % 32 == k % 64 == 0
            and scales.shape == (k // 64, n)
            and code.shape == (16,)
            and (packed.dtype, scales.dtype, code.dtype) == (torch.uint8, torch.bfloat16, torch.float32)
            and all(tensor.is_contiguous() for tensor in weight)
        )
        self._function, self._tiles = function, tiles
        self._n, self._k = n, k
        self._weight = weight  # whose memory lives as long as this
        self._pointers = packed.data_ptr(), scales.data_ptr(), code.data_ptr()

    def __call__(self, x: Tensor, added: LowRankSums | None = None) -> Tensor:
        """x[…, k], tokens side by side, to […, n], both bfloat16; `added` are sums of the same x, added to what is
        rounded already. A token's outputs are the same to the bit whatever tokens stand beside it.
        """
        *shape, k = x.shape
        tokens = x.numel() // self._k
        _require(k == self._k and x.dtype is torch.bfloat16 and x.is_contiguous())
        _require(added is None or added.fit(tokens, k, self._n))
        y = torch.empty(*shape, self._n, dtype=torch.bfloat16)
        sums = (None, 0) if added is None else (added.pointer, added.length)
        self._function(x.data_ptr(), *self._pointers, y.data_ptr(), tokens, self._n, k, self._tiles, *sums)
        return y


class RMSNorm:
    """Root mean square normalisation with one weight."""

    def __init__(self, function: Callable[..., None], weight: Tensor, epsilon: float) -> None:
        _require(weight.dim() == 1 and len(weight) % 16 == 0 and weight.is_contiguous())
        self._function, self._epsilon = function, epsilon
        self._weight, self._pointer, self._width = weight, weight.data_ptr(), len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x[…, width] to the same shape, contiguous bfloat16."""
        width = self._width
        _require(x.shape[-1] == width and x.is_contiguous())
        y = torch.empty_like(x)
        self._function(y.data_ptr(), x.data_ptr(), self._pointer, self._epsilon, x.numel() // width, width)
        return y


class Native:
    """The compiled library. What it computes, or gives to compute with, runs on torch's threads, without the GIL, and
    raises ValueError for operands of other shapes or layouts than it says.

    has_nf4_product: whether `nf4_product` can be used, for which the processor must have AVX512_BF16.
    has_tiles: whether that takes the tiles of AMX.
    """

    value_widths = range(16, 513, 16)

    def __init__(self, path: Path) -> None:
        """Raises OSError when it can't be loaded."""
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self.has_nf4_product, self.has_tiles = bool(library.has_nf4_product()), bool(library.request_tiles())
        self._add_low_rank = library.add_low_rank
        self._dense_product = library.dense_product
        self._nf4_product = library.nf4_product
        self._paged_decode = library.paged_decode
        self._rms_norm = library.rms_norm

    def low_rank_sums(self, a: Tensor, b: Tensor, runs: Sequence[Run]) -> LowRankSums:
        """For contiguous a[…, r, in] and b[…, r, out], bfloat16, and runs of rows of both, whose tokens are apart."""
        return LowRankSums(self._add_low_rank, a, b, runs)

    def dense_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x[T, k] times weight[n, k]: [T, n], all bfloat16."""
        (tokens, k), n = x.shape, weight.shape[0]
        _require(x.stride(1) == 1 and weight.shape[1] == k and weight.is_contiguous())
        y = torch.empty(tokens, n, dtype=torch.bfloat16)
        self._dense_product(x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), tokens, n, k)
        return y

    def nf4_product(self, packed: Tensor, scales: Tensor, code: Tensor) -> NF4Product:
        """For packed[n, k/2] uint8, scales[k/64, n] bfloat16 and code[16] float32, n in 32s and k in 64s."""
        return NF4Product(self._nf4_product, (packed, scales, code), tiles=self.has_tiles)

    def rms_norm(self, weight: Tensor, epsilon: float) -> RMSNorm:
        """For weight[width], bfloat16, in 16s."""
        return RMSNorm(self._rms_norm, weight, epsilon)

    def paged_decode(
        self, q: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """See `kernels.paged_attention`; all bfloat16 and contiguous, values `value_widths` wide."""
        (rows, heads, key_width), (_, kv_heads, value_width), length = q.shape, v_pool.shape, slots.shape[1]
        _require(
            k_pool.shape == (len(v_pool), kv_heads, key_width)
            and value_width in self.value_widths
            and heads % kv_heads == 0
            and slots.shape == mask.shape == (rows, length)
            and all(tensor.is_contiguous() for tensor in (q, k_pool, v_pool, slots, mask))
        )
        out = torch.empty(rows, heads, value_width, dtype=torch.bfloat16)
        self._paged_decode(
            out.data_ptr(), q.data_ptr(), k_pool.data_ptr(), v_pool.data_ptr(), slots.data_ptr(), mask.data_ptr(),
            scale, rows, length, heads, kv_heads, key_width, value_width,
        )  # fmt: skip
        return out


@functools.cache
def native() -> Native | None:
    """The library, compiled when a process first asks; None where that can't be done."""
    # In a folder of this process alone: what lies in a cache might be another's, or cut short by a crash.
    try:
        with tempfile.TemporaryDirectory(prefix="hatrack-") as folder:
            return Native(_compiled(Path(folder)))
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    except subprocess.CalledProcessError as error:
        reason = next(iter(error.stderr.decode(errors="replace").splitlines()), str(error))
    logger.warning("no C kernels, so steps take longer on the CPU: %s", reason)
    return None


def _compiled(folder: Path) -> Path:
    library = folder / "kernels.so"
    command: list[str | Path] = [COMPILER, *FLAGS, *sorted(HERE.glob("*.c")), "-o", library]
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)  # noqa: S603
    return library


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("operands of a C kernel don't fit together")
