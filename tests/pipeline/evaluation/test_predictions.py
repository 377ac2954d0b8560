"""Predictions per image: one row for each scored image, in a fixed order, that adds up to the receipt's accuracy."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mae_core.classification.metrics import topk_counts
from pipeline.evaluation import predictions


def rows(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def test_rows_are_ordered_by_sample_id_and_add_up_to_the_counts(monkeypatch):
    monkeypatch.setattr(predictions, "_IMAGES_AT_A_TIME", 7)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(1000, generator=generator)[:50]
    labels = torch.randint(0, 9, (50,), generator=generator)
    scores = torch.randn(50, 9, generator=generator)
    table = rows(predictions.encode(ids, labels, scores))
    assert table.schema.equals(
        pa.schema([("sample_id", pa.int64()), ("label", pa.int64()), ("top5", pa.list_(pa.int64(), 5))])
    )
    of = {int(number): index for index, number in enumerate(ids)}
    assert table["sample_id"].to_pylist() == sorted(of)
    counts = topk_counts(scores, labels)
    read = table.to_pylist()
    assert sum(row["label"] == row["top5"][0] for row in read) == counts.correct_top1
    assert sum(row["label"] in row["top5"] for row in read) == counts.correct_top5
    for row in read:
        assert row["label"] == labels[of[row["sample_id"]]]
        assert row["top5"] == scores[of[row["sample_id"]]].sort(descending=True).indices[:5].tolist()


def test_fewer_than_five_classes_are_padded_and_equal_scores_name_the_lower_class():
    scores = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 3.0]])
    table = rows(predictions.encode(torch.tensor([7, 3]), torch.tensor([1, 2]), scores))
    assert table["top5"].to_pylist() == [[2, 0, 1, -1, -1], [1, 2, 0, -1, -1]]
    assert table["label"].to_pylist() == [2, 1]


def test_images_without_a_label_are_left_out():
    data = predictions.encode(torch.tensor([5, 4, 4]), torch.tensor([0, -1, -1]), torch.eye(3))
    assert rows(data)["sample_id"].to_pylist() == [5]
    none = rows(predictions.encode(torch.tensor([5]), torch.tensor([-1]), torch.ones(1, 3)))
    assert none.num_rows == 0


def test_the_same_predictions_are_the_same_bytes_in_any_order():
    ids, labels = torch.arange(40), torch.arange(40) % 6
    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert predictions.encode(ids, labels, scores) == predictions.encode(
        ids[shuffled], labels[shuffled], scores[shuffled]
    )


def test_a_duplicate_and_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="predicted twice"):
        predictions.encode(torch.tensor([5, 5]), torch.tensor([0, 0]), torch.ones(2, 3))
    with pytest.raises(ValueError, match="2 sample ids, 1 labels and 2 rows"):
        predictions.encode(torch.tensor([5, 6]), torch.tensor([0]), torch.ones(2, 3))
