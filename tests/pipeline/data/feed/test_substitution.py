"""Substitutes are computed, and their number is limited."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.feed.substitution import (
    CANDIDATES,
    Substitution,
    candidates,
    check_limit,
    most_allowed,
)
from pipeline.errors import DataError


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60, unique=True), st.integers(0, 5), st.integers(-3, 3))
def test_candidates_are_other_samples_each_once_in_an_order_of_their_ids_alone(ids, epoch, seed):
    ids = np.array(ids)
    found = candidates(ids, int(ids[0]), seed=seed, epoch=epoch)
    assert len(found) == len(set(found.tolist())) == min(CANDIDATES, len(ids) - 1)
    assert 0 not in found
    turned = candidates(ids[::-1], int(ids[0]), seed=seed, epoch=epoch)
    assert ids[::-1][turned].tolist() == ids[found].tolist()


def test_golden_candidates():
    """A change here changes which images a resumed run sees."""
    assert candidates(np.arange(100, 110), 103, seed=7, epoch=2).tolist() == [9, 4, 1, 0, 6, 5, 2, 8, 7]


def test_substitutes_differ_by_epoch_and_sample_so_that_none_is_seen_all_the_time():
    ids = np.arange(40)
    first = [int(candidates(ids, sample, seed=0, epoch=epoch)[0]) for sample in range(10) for epoch in range(10)]
    assert len(set(first)) > 25  # 100 draws from 39: 36 expected


def made(count, epoch):
    return [Substitution(id_, id_ + 1, epoch, 5, "crc32", f"{id_}.jpg") for id_ in range(count)]


def test_three_or_one_in_ten_thousand_are_tolerated_per_epoch():
    assert [most_allowed(count) for count in (1, 1000, 30_000, 50_000, 1_281_167)] == [3, 3, 3, 5, 128]
    check_limit([], 1000, "here")
    for epochs in ((0,), (0, 1, 2, 3)):  # an unreadable image comes back in every epoch
        check_limit([one for epoch in epochs for one in made(3, epoch)], 1000, "here")
    for rest in ([], made(1, 7)):  # too many in the last epoch, or in the one that the last batch has ended
        with pytest.raises(DataError, match=r"here: 7 samples of epoch 6 .* the 3 .*and 2 more\. .*restore") as caught:
            check_limit([*made(7, 6), *rest], 1000, "here")
        assert "0.jpg (id 0, crc32)" in str(caught.value)
        assert "5.jpg" not in str(caught.value)
