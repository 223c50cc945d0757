"""Blocks of the cache: rows share those with equal content alone, and none is lost."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlora.models.kv_cache import BLOCK
from jlora.serve.block_pool import BlockPool

# A row's tokens: blocks of one letter each, and a few more tokens.
TOKENS = st.builds(
    lambda words, rest: [ord(word) for word in words for _ in range(BLOCK)] + [0] * rest,
    st.text("ab", max_size=4),
    st.integers(1, BLOCK),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), TOKENS, st.integers(0, 3 * BLOCK), st.sampled_from(["law", "style"])),
        st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 3 * BLOCK)),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("forget")),
    ),
    max_size=40,
)


class Row:
    """A row that writes into `content` what its blocks contain: the start and all tokens up to the block's end."""

    def __init__(self, tokens, positions, start, blocks, computed):
        self.tokens, self.positions, self.start, self.blocks = tokens, positions, start, blocks
        self.computed = computed

    def expected(self, i):
        return self.start, tuple(self.tokens[: (i + 1) * BLOCK])

    def compute(self, count, content):
        self.computed = min(self.computed + count, self.positions)
        self.tokens += [1] * (self.computed - len(self.tokens))  # generated ones
        for i in range(self.computed // BLOCK):
            content[self.blocks[i]] = self.expected(i)


def history(pool, events):
    """Follows what blocks contain while rows take them and give them back; returns how many were shared."""
    rows, content, shared = [], {}, 0
    for name, *values in events:
        if name == "take":
            tokens, more, start = values
            taken = pool.take(tokens, len(tokens) + more, start)
            needed = -(-(len(tokens) + more) // BLOCK)
            if taken is None:
                assert needed > pool.free, "there was room"
                continue
            row = Row(list(tokens), len(tokens) + more, start, *taken)
            assert row.computed < len(tokens) and row.computed % BLOCK == 0
            assert len(set(row.blocks)) == len(row.blocks) == needed
            own = row.computed // BLOCK
            assert all(content[row.blocks[i]] == row.expected(i) for i in range(own)), "shared, but different"
            used = {block for other in rows for block in other.blocks}
            assert used.isdisjoint(row.blocks[own:]), "taken twice"
            for block in row.blocks[own:]:
                content.pop(block, None)
            shared += own
            rows.append(row)
        elif name == "forget":
            pool.forget()
        elif rows:
            row = rows[values[0] % len(rows)]
            if name == "compute":
                row.compute(values[1], content)
            else:
                rows.remove(row)
            pool.remember(row.blocks, row.tokens[: row.computed], row.start)
            if name == "end":
                pool.give_back(row.blocks)
        assert pool.free + len({block for row in rows for block in row.blocks}) == pool.size
    for row in rows:
        pool.give_back(row.blocks)
    assert pool.free == pool.size
    return shared


A, AB = [ord("a")] * BLOCK + [0], [ord("a")] * BLOCK + [ord("b")] * BLOCK + [0]
EVICTED = [
    *(("take", AB, 0, "law"), ("compute", 0, 3 * BLOCK), ("end", 0)),
    *(("take", [ord("b")] * 4 * BLOCK + [0], 0, "style"), ("compute", 0, 5 * BLOCK), ("end", 0)),  # all five blocks
    ("take", AB, 0, "law"),
]


@given(EVENTS)
@example(EVICTED)
@settings(max_examples=400, deadline=None)
def test_blocks_are_shared_only_if_their_content_is_equal(events):
    history(BlockPool(6), events)


def test_rows_share_what_others_have_computed():
    events = [("take", AB, 0, "law"), ("compute", 0, 3 * BLOCK), ("take", AB, 0, "law"), ("take", A, 0, "style")]
    assert history(BlockPool(9), events) == 2
    assert history(BlockPool(9), [*events[:2], ("forget",), *events[2:]]) == 0


def test_a_pool_that_still_finds_reused_blocks_is_detected():
    """The negative control of the test above."""

    class Careless(BlockPool):
        def _take_oldest(self):
            block, _ = self._free.popitem(last=False)
            self._users[block] = 1
            return block

    with pytest.raises((AssertionError, KeyError)):
        history(Careless(6), EVICTED)
