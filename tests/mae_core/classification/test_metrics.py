"""Sums and counts: parts add up to the whole, and padding does not count."""

import pytest
import torch

from mae_core import TopK, best_classes, topk_counts


def test_counts_by_hand():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
    counts = topk_counts(logits, torch.tensor([0, 2, 6]))
    assert (counts.correct_top1, counts.correct_top5, counts.count) == (1, 2, 3)
    assert counts.top1 == pytest.approx(1 / 3)
    assert counts.top5 == pytest.approx(2 / 3)


def test_uneven_parts_add_up_to_the_whole_and_padding_is_left_out(generator):
    logits = torch.randn(11, 7, generator=generator)
    labels = torch.randint(0, 7, (11,), generator=generator)
    whole = topk_counts(logits, labels)
    padded = torch.cat([labels[8:], torch.tensor([-1])])
    parts = [
        topk_counts(logits[:8], labels[:8]),
        topk_counts(torch.cat([logits[8:], logits[:1]]), padded),
    ]
    total = sum(parts, TopK())
    assert (total.correct_top1, total.correct_top5, total.count) == (
        whole.correct_top1,
        whole.correct_top5,
        whole.count,
    )
    assert total.loss == pytest.approx(whole.loss, rel=1e-12)  # float32 terms summed in double
    assert whole.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)  # float32


def test_few_classes_and_no_images():
    assert topk_counts(torch.zeros(2, 3), torch.tensor([0, 1])).correct_top5 == 2
    with pytest.raises(ValueError, match="no image was counted"):
        _ = TopK().top1


def test_of_equal_scores_the_lower_class_is_the_better():
    scores = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 0.0, 3.0, 3.0]])
    assert best_classes(scores, 3).tolist() == [[1, 2, 0], [2, 3, 0]]
    assert best_classes(scores, 9).shape == (2, 4)
    assert scores[0].tolist() == [0.0, 1.0, 1.0, 0.0]  # untouched
    drawn = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(best_classes(drawn, 5), drawn.topk(5).indices)
