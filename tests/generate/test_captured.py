"""What a captured pass reads; the passes themselves want a GPU (tests/gpu/test_graphs.py)."""

from undistilled.generate.graphs import numbers
from undistilled.parallel.messages import Pass


def test_missing_rows_repeat_the_last_one_and_missing_blocks_are_the_first():
    work = Pass([5, 6, 7], [0, 9, 4], [8, 1, 2], [[4, 0], [2, 3], [1, 0]], [1, 10, 5], False, [0, 1, 2])
    rows = [[5, 6, 7, 7], [0, 9, 4, 4], [8, 1, 2, 2]]
    tables = [[4, 0, 0], [2, 3, 0], [1, 0, 0], [1, 0, 0]]
    assert numbers(work, 4, 3).tolist() == [value for row in (*rows, *tables) for value in row]
