"""Every protocol with a head refuses a label that the head lacks, before it computes features or trains."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_kit import SEED, attempt_at, encoder_config

from pipeline.data.dataset.schema import SAMPLES
from pipeline.errors import DataError
from pipeline.evaluation.features import FOLDER
from pipeline.evaluation.protocol import ProtocolConfig
from pipeline.evaluation.protocols import PROTOCOL_NAMES, protocol_named
from pipeline.graph.step import StageInput

WITH_LABELS = [name for name in PROTOCOL_NAMES if protocol_named(name).needs_labels]


@pytest.fixture
def mislabelled(shards, tmp_path) -> StageInput:
    """The dataset with label 7 on one training image, as if its tables were of different runs."""
    copy = replace(shards, root_uri=(tmp_path / "store" / "shard").as_uri())
    shutil.copytree(shards.root_uri.removeprefix("file://"), tmp_path / "store" / "shard")
    path = Path(copy.store.uri.removeprefix("file://")) / "samples.parquet"
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(group).to_pylist() for group in range(file.num_row_groups)]
    next(row for rows in groups for row in rows if row["sample_id"] == 11)["label"] = 7
    with pq.ParquetWriter(path, SAMPLES) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, SAMPLES))
    return copy


@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_label_that_the_head_lacks_is_refused_before_anything_is_computed(mislabelled, tmp_path, name):
    protocol = protocol_named(name)
    common = ProtocolConfig(encoder=encoder_config(), weights="random", train_labels=None, seed=SEED)
    (settings, *_) = protocol.variants(protocol.settings()).values()
    attempt = attempt_at(tmp_path / "store" / "step")
    with pytest.raises(DataError, match="sample 11 has label 7, but the dataset names only 3 classes, 0 to 2"):
        protocol.evaluate(protocol.step_config(common, settings), {"shards": mislabelled}, attempt)
    assert list(attempt.store.list()) == []
    assert not (tmp_path / "store" / FOLDER).exists()


def test_the_protocols_with_a_head_are_all_but_rankme():
    assert set(WITH_LABELS) == set(PROTOCOL_NAMES) - {"rankme"}
