"""The neighbours' vote equals scikit-learn's, whatever the tiles, and stays within its memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from mae_core import nearest, topk_counts, votes
from mae_core.classification import neighbours as module

CLASSES, TEMPERATURE = 7, 0.07


def drawn(n: int, m: int, dim: int = 24, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, dim, generator=generator)
    labels = torch.randint(0, CLASSES, (m,), generator=generator)
    truth = torch.randint(0, CLASSES, (n,), generator=generator)
    bank = centres[labels] + 1.5 * torch.randn(m, dim, generator=generator)
    queries = centres[truth] + 1.5 * torch.randn(n, dim, generator=generator)
    return queries, truth, bank, labels


@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_votes_and_accuracies_are_those_of_scikit_learn(k):
    queries, truth, bank, labels = drawn(300, 500)
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
    expected = oracle.fit(bank.numpy().astype(np.float64), labels).predict_proba(queries.numpy().astype(np.float64))
    shares = votes(nearest(queries, bank, labels, count=200), k=k, temperature=TEMPERATURE, num_classes=CLASSES)
    # float32 cosines are right to 2e-7, and exp(x / 0.07) turns that into 3e-6 of a share; worst 1.5e-6
    np.testing.assert_allclose(shares.numpy(), expected, rtol=0, atol=1e-5)
    counted = topk_counts(shares, truth)
    assert counted.top1 == pytest.approx((expected.argmax(axis=1) == truth.numpy()).mean())
    if k > 1:  # with one neighbour, six of seven classes tie
        assert counted.top5 == pytest.approx(top_k_accuracy_score(truth, expected, k=5), abs=0.02)


def test_tiles_do_not_change_the_neighbours(monkeypatch):
    queries, _, bank, labels = drawn(50, 333)
    whole = nearest(queries, bank, labels, count=40)
    assert whole.likeness.shape == (50, 40)
    monkeypatch.setattr(module, "_QUERIES", 7)
    monkeypatch.setattr(module, "_BANK", 30)
    tiled = nearest(queries, bank, labels, count=40)
    torch.testing.assert_close(tiled.likeness, whole.likeness, rtol=0, atol=1e-6)
    assert torch.equal(tiled.labels, whole.labels)
    assert (whole.likeness.diff(dim=1) <= 0).all()


def test_a_small_bank_votes_as_a_whole_and_none_is_refused():
    queries, _, bank, labels = drawn(5, 8)
    found = nearest(queries, bank, labels, count=200)
    assert found.labels.shape == (5, 8)
    torch.testing.assert_close(
        votes(found, k=200, temperature=0.001, num_classes=CLASSES).sum(dim=1), torch.ones(5), rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="bank of 0 features"):
        nearest(queries, bank[:0], labels[:0], count=1)


MEASURED = """
import resource, torch
from mae_core import nearest, votes
torch.set_num_threads(2)
queries, bank = torch.randn(12_000, 64), torch.randn(10_000, 64)
labels = torch.arange(10_000) % 1000
nearest(queries[:1100], bank, labels, count=200)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shares = votes(nearest(queries, bank, labels, count=200), k=20, temperature=0.07, num_classes=1000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_bounded():
    # 12,000 x 10,000 similarities would take 458 MiB; neighbours take 27 MiB, twice that while they are joined, votes 46 MiB
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250
