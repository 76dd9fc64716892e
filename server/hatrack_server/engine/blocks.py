"""KV blocks: who holds which, and which full ones can be shared by prefix. The tensors lie in the model."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens

from hatrack_server.engine.sequence import Sequence


class KVBlocks:
    """Blocks 1 … total, reference-counted; block 0 is never given out, because padding points at it.

    A full block is known by a key that chains (tenant salt, base, artifact digest, every token up to its end), so that
    neither another tenant, nor another adapter, nor a replaced version can ever meet it. A block that nobody holds
    keeps its key until it is given out again, longest unused first.
    """

    def __init__(self, total: int, block_size: int, base: str, *, prefix_cache: bool = True) -> None:
        """`base` is the base's fingerprint: part of every key."""
        self.total = total
        self.block_size = block_size
        self._base = base.encode()
        self._prefix_cache = prefix_cache
        self._references = [0] * (total + 1)
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(1, total + 1))

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def can_admit(self, sequence: Sequence, *, spare: int = 0) -> bool:
        """Whether all tokens of a sequence without blocks fit, counting what the prefix cache has of it.

        `spare` blocks must be left over, for running sequences to grow.
        """
        cached = self._cached_prefix(sequence)
        reclaimed = sum(self._references[block] == 0 for block in cached)
        return self.needed(len(sequence.tokens)) - len(cached) + spare <= len(self._free) - reclaimed

    def admit(self, sequence: Sequence) -> None:
        """Takes the cached prefix's blocks; sets `blocks` and `computed`. At least one token is left to compute."""
        assert not sequence.blocks
        sequence.blocks = self._cached_prefix(sequence)
        for block in sequence.blocks:
            self._take(block)
        sequence.computed = len(sequence.blocks) * self.block_size

    def can_grow(self, *growing: tuple[Sequence, int]) -> bool:
        """Whether each sequence can have blocks for as many of its first tokens as stand beside it."""
        missing = (self.needed(tokens) - len(sequence.blocks) for sequence, tokens in growing)
        return sum(max(0, blocks) for blocks in missing) <= len(self._free)

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Gives `sequence` blocks for its first `tokens` tokens. Requires `can_grow`."""
        while len(sequence.blocks) < self.needed(tokens):
            block = next(iter(self._free))
            self._forget(block)
            self._take(block)
            sequence.blocks.append(block)

    def publish(self, sequence: Sequence, count: int) -> None:
        """Makes the blocks that the last `count` computed tokens filled findable by others with the same prefix."""
        if not self._prefix_cache:
            return
        filled = slice((sequence.computed - count) // self.block_size, sequence.computed // self.block_size)
        self._extend_keys(sequence, filled.stop)
        for block, key in zip(sequence.blocks[filled], sequence.keys[filled], strict=True):
            if block not in self._key_of and key not in self._block_of:
                self._key_of[block] = key
                self._block_of[key] = block

    def release(self, sequence: Sequence) -> None:
        """Takes every block back; a block's content stays findable until it is given out again."""
        # Last first: the end of a prefix is worth less than its beginning, so it is given out earlier.
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
        sequence.blocks = []
        sequence.computed = 0

    def check(self, sequences: Tokens[Sequence]) -> None:
        """Asserts that references and free blocks add up, given every sequence that holds blocks."""
        counted = [0] * (self.total + 1)
        for sequence in sequences:
            for block in sequence.blocks:
                counted[block] += 1
        assert counted == self._references
        assert all((count == 0) == (block in self._free) for block, count in enumerate(counted) if block)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        if not self._prefix_cache:
            return []
        full = (len(sequence.tokens) - 1) // self.block_size
        self._extend_keys(sequence, full)
        found: list[int] = []
        for key in sequence.keys[:full]:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _extend_keys(self, sequence: Sequence, full: int) -> None:
        if not sequence.keys and full:
            generation = sequence.generation
            seed = hashlib.blake2b(digest_size=16)
            for part in (generation.salt, self._base, (sequence.digest or "").encode()):
                seed.update(len(part).to_bytes(8, "big") + part)
            previous = seed.digest()
        else:
            previous = sequence.keys[-1] if sequence.keys else b""
        for index in range(len(sequence.keys), full):
            tokens = array("q", sequence.tokens[index * self.block_size : (index + 1) * self.block_size])
            previous = hashlib.blake2b(previous + tokens.tobytes(), digest_size=16).digest()
            sequence.keys.append(previous)

    def _take(self, block: int) -> None:
        self._references[block] += 1
        self._free.pop(block, None)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
