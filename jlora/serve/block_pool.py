"""Blocks of the key-value cache: rows take and give them back, and rows that start alike share them.

A block that a row has filled stays known by its tokens and by all tokens before it, also after the row has ended, until
another row needs the block. So a system prompt is computed once, and so are the earlier turns of a conversation.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from jlora.models.kv_cache import BLOCK, UNUSED

Key = tuple[Hashable, tuple[int, ...]]  # what comes before a block, and its tokens


class BlockPool:
    """The blocks of one cache.

    Args:
      count: blocks of the cache, with the one that no row reads.
    """

    def __init__(self, count: int) -> None:
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(count) if block != UNUSED)
        self._users = dict.fromkeys(self._free, 0)
        self._known: dict[Key, tuple[int, int]] = {}  # -> the block, and a number that stands for the chain up to it
        self._key_of: dict[int, Key] = {}
        self._numbers = itertools.count()
        self.size = len(self._free)

    @property
    def free(self) -> int:
        """Number of blocks that no row uses."""
        return len(self._free)

    def take(self, tokens: Sequence[int], positions: int, start: Hashable) -> tuple[list[int], int] | None:
        """Takes blocks for a row.

        Args:
          tokens: the row's tokens so far; the last one is always computed, because what follows it is wanted.
          positions: number of tokens that the row will have at most.
          start: rows share blocks only if this is equal: what else the keys and values depend on.

        Returns:
          The row's blocks, and how many of its tokens they contain already; None if too few are free.
        """
        shared = [block for block, _ in self._chain(tokens[:-1], start)]
        needed = -(-positions // BLOCK) - len(shared)
        if needed > len(self._free) - sum(block in self._free for block in shared):
            return None
        for block in shared:
            self._free.pop(block, None)
            self._users[block] += 1
        return shared + [self._take_oldest() for _ in range(needed)], len(shared) * BLOCK

    def remember(self, blocks: Sequence[int], tokens: Sequence[int], start: Hashable) -> None:
        """Makes the blocks that these tokens fill available to other rows; all tokens must be in the cache."""
        before: Hashable = start
        for i in range(len(tokens) // BLOCK):
            key = before, tuple(tokens[i * BLOCK : (i + 1) * BLOCK])
            if key not in self._known:
                if old := self._key_of.pop(blocks[i], None):  # what came before it has been reused and computed again
                    del self._known[old]
                self._known[key] = blocks[i], next(self._numbers)
                self._key_of[blocks[i]] = key
            before = self._known[key][1]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Takes blocks back from a row that has ended. The last ones are reused first: fewer rows share them."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None

    def forget(self) -> None:
        """Forgets what all blocks contain, because the weights have changed."""
        self._known.clear()
        self._key_of.clear()

    def _chain(self, tokens: Sequence[int], start: Hashable) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        before: Hashable = start
        for i in range(len(tokens) // BLOCK):
            entry = self._known.get((before, tuple(tokens[i * BLOCK : (i + 1) * BLOCK])))
            if entry is None:
                break
            found.append(entry)
            before = entry[1]
        return found

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._users[block] = 1
        if key := self._key_of.pop(block, None):
            del self._known[key]
        return block
