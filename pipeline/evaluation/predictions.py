"""Predictions per image, the file that every protocol that classifies leaves beside its scores.

Columns of `predictions.parquet`, one row per scored image, ordered by sample_id:
    sample_id int64; label int64; top5 list of 5 int64, the classes of the highest scores, best first, -1 beyond the last class
The shares of rows whose label is top5[0], or in top5, are the receipt's top1 and top5."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mae_core.classification.metrics import best_classes

PREDICTIONS = "predictions.parquet"
BEST = 5
_IMAGES_AT_A_TIME = 4096  # 16 MiB of scores of 1,000 classes


def encode(sample_ids: Tensor, labels: Tensor, scores: Tensor) -> bytes:
    """Return the content of the file. Images with a negative label, which marks a missing one or padding, are left out.

    Shapes: sample_ids int64 [n], labels int64 [n], scores [n, classes], the higher the better; on any device.

    Raises:
        ValueError: The numbers of ids, labels and scores differ, or an image is there twice.
    """
    if not len(sample_ids) == len(labels) == len(scores):
        raise ValueError(f"{len(sample_ids)} sample ids, {len(labels)} labels and {len(scores)} rows of scores differ")
    return encode_best(
        sample_ids, labels, torch.cat([best_classes(part, BEST) for part in torch.split(scores, _IMAGES_AT_A_TIME)])
    )


def encode_best(sample_ids: Tensor, labels: Tensor, best: Tensor) -> bytes:
    """Return the content of the file, from the classes of the highest scores, best first.

    Shapes: sample_ids int64 [n], labels int64 [n], best int64 [n, at most BEST]; on any device.

    Raises:
        ValueError: An image is there twice.
    """
    order = sample_ids.argsort()
    order = order[labels[order] >= 0]
    ids = sample_ids[order].cpu().numpy()
    if len(np.unique(ids)) < len(ids):
        raise ValueError("an image was predicted twice: drop padded duplicates before they are encoded")
    filled = np.full((len(ids), BEST), -1, dtype=np.int64)
    filled[:, : best.shape[1]] = best[order].cpu().numpy()
    table = pa.table(
        {
            "sample_id": pa.array(ids, pa.int64()),
            "label": pa.array(labels[order].cpu().numpy(), pa.int64()),
            "top5": pa.FixedSizeListArray.from_arrays(pa.array(filled.ravel(), pa.int64()), BEST),
        }
    )
    written = pa.BufferOutputStream()
    pq.write_table(table, written, compression="zstd")
    return bytes(written.getvalue())
