"""RankMe is the paper's formula on the singular values, and counts the directions that are used."""

import pytest
import torch

from mae_core import rankme
from mae_core.classification import rankme as module


@pytest.mark.parametrize(("n", "dim"), [(300, 20), (10, 40), (64, 64)])
def test_it_is_the_formula_on_the_singular_values(n, dim, monkeypatch):
    monkeypatch.setattr(module, "_IMAGES_AT_A_TIME", 33)
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(n)) * torch.logspace(0, -3, dim)
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)


def test_equal_directions_count_in_full_and_copies_do_not():
    assert rankme(torch.eye(16).repeat(5, 1)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.ones(50, 16)) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.cat([torch.eye(8), torch.eye(8)], dim=1)) == pytest.approx(8, rel=1e-4)


def test_scale_and_order_of_the_images_do_not_matter():
    features = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    assert rankme(features) == pytest.approx(rankme(7 * features.flip(0)), rel=1e-9)


def test_nothing_to_measure_is_refused():
    for features in (torch.zeros(5, 4), torch.empty(0, 4), torch.full((3, 4), torch.nan)):
        with pytest.raises(ValueError, match="no rank"):
            rankme(features)
