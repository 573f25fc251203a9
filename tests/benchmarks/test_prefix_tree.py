"""The batches of the benchmarks of shared prefixes share what their names say."""

from __future__ import annotations

from benchmarks.prefix_tree import PAGE, SUFFIX, PrefixTree


def test_sequences_share_the_root_and_those_of_a_group_their_branch_and_nothing_else() -> None:
    tree = PrefixTree(root_tokens=64, leaves=3, branch_tokens=32, groups=2)
    tables = [reader.blocks.tolist() for reader in tree.readers()]
    assert len(tables) == tree.sequences == 6
    assert {len(table) for table in tables} == {(64 + 32 + SUFFIX) // PAGE}
    for one, left in enumerate(tables):
        for other, right in enumerate(tables[:one]):
            common = [block for block in left if block in right]
            shared_tokens = 64 + 32 if one // 3 == other // 3 else 64
            assert common == left[: shared_tokens // PAGE] == right[: shared_tokens // PAGE]
    assert sorted({block for table in tables for block in table}) == list(range(tree.pages))


def test_the_rows_of_a_prefill_are_the_last_ones_of_each_sequence() -> None:
    tree = PrefixTree(root_tokens=64, leaves=2, rows=256)
    first, second = tree.readers()
    assert (first.start, second.start) == (0, 256)
    assert first.count == second.count == 256
    assert first.first + first.count == len(first.blocks) * PAGE == 64 + 256
