"""Sizes as people write them."""

import pytest

from undistilled.errors import UsageError
from undistilled.verbs import size


@pytest.mark.parametrize(
    "text, count",
    [("4096", 4096), ("10B", 10), ("200GB", 200 * 10**9), ("1.5 GiB", 3 << 29), ("3kb", 3000), (" 2 MiB ", 2 << 20)],
)
def test_a_size(text, count):
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1TB of it", "1e9", "nan"])
def test_no_size(text):
    with pytest.raises(UsageError, match="no size"):
        size(text)
