"""A worker's part of a batch, cut into micro-batches without a copy."""

import pytest
import torch
from feed_kit import loader, make_dataset

from pipeline.training.engine.micro_batches import split
from pipeline.training.engine.settings import EngineSettings

CPU = torch.device("cpu")


def settings(micro_batch: int, accumulation: int) -> EngineSettings:
    return EngineSettings(
        precision="fp32",
        zero_stage=1,
        micro_batch=micro_batch,
        accumulation=accumulation,
        betas=(0.9, 0.95),
        max_grad_norm=None,
        offload="none",
        activation_checkpointing=False,
    )


@pytest.mark.parametrize(
    ("count", "sizes", "weights"),
    [
        (12, [4, 4, 4], [1] * 12),
        (9, [4, 4, 1], [1] * 9),
        (5, [4, 1, 1], [1, 1, 1, 1, 1, 0]),  # the last one is the first sample again
        (0, [1, 1, 1], [0, 0, 0]),
    ],
)
def test_every_sample_once_and_padding_without_weight(count, sizes, weights):
    images, labels = torch.arange(count * 2).reshape(count, 2), torch.arange(count)
    found = split((images, labels), settings(4, 3), CPU)
    assert [len(micro_batch.weights) for micro_batch in found] == sizes
    given = torch.cat([micro_batch.weights for micro_batch in found])
    assert given.tolist() == weights
    for tensor, at in ((images, 0), (labels, 1)):
        whole = torch.cat([micro_batch.inputs[at] for micro_batch in found])
        assert torch.equal(whole[given > 0], tensor)


def test_a_picture_is_copied_once_between_its_decoding_and_the_micro_batch(tmp_path):
    """Workers write into the batch's memory, and micro-batches are views of it."""
    manifest = make_dataset(tmp_path)
    (batch,) = loader(manifest, decode_workers=1).from_step(0, 1)
    memory = batch.images.untyped_storage()
    assert memory.nbytes() == 12 * (24 * 24 * 3 + 3 * 8)
    for micro_batch in split((batch.images, batch.labels), settings(5, 3), CPU):
        for tensor in micro_batch.inputs:
            assert tensor.untyped_storage().data_ptr() == memory.data_ptr()
