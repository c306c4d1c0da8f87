"""Paged KV blocks: allocate, share by prefix, free.

Sharing is per full block, by a hash chained over everything before it (vLLM's scheme, Kwon et al.
2023); no radix tree, because our prompts share system text and earlier turns. Every block is in
exactly one of three places: free, cached (nobody holds it, its content can still be shared) or held.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence


class BlockManager:
    """Hands out block numbers 0..num_blocks-1; the tensors live elsewhere."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # evicted from the front
        self._refs: dict[int, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return len(self._refs)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the oldest cached contents are dropped when no block is free."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        blocks = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """Hold the blocks of the longest known prefix of `hashes`."""
        blocks = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            self._cached.pop(block, None)
            self._refs[block] = self._refs.get(block, 0) + 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, content: bytes) -> None:
        """Make a held, completely written block shareable under the hash of its content."""
        if block in self._hash_of or content in self._block_of:
            return  # another sequence computed the same prefix meanwhile; that copy serves
        self._hash_of[block] = content
        self._block_of[content] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each; the last blocks of a prefix are evicted first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            del self._refs[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books balance with the block tables of all owners."""
        owners = Counter(block for table in tables for block in table)
        free, cached, held = set(self._free), set(self._cached), set(self._refs)
        problems = {
            "reference counts differ from owners": owners != Counter(self._refs),
            "a block is listed free twice": len(free) != len(self._free),
            "a block is in two places": bool(free & cached or free & held or cached & held),
            "blocks are lost": len(free) + len(cached) + len(held) != self.num_blocks,
            "a cached block has no hash": not cached <= self._hash_of.keys(),
            "a free block has a hash": bool(free & self._hash_of.keys()),
            "the hash tables disagree": {h: b for b, h in self._hash_of.items()} != self._block_of,
        }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise AssertionError("; ".join(wrong))

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block
