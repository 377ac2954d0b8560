"""Other readers read our tars, and one local task writes the same dataset as eight tasks on a real cluster."""

import io
import multiprocessing
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_kit import all_objects, labelled, listed, manifest_of, picture, sharded, stored, write_table, write_tars
from PIL import Image

from pipeline import cluster
from pipeline.storage import open_store


def images(folder):
    for number in range(30):
        kind = "PNG" if number % 5 == 0 else "JPEG"
        open_store(str(folder)).write(
            f"{'cat' if number % 3 else 'dog'}/{number:02d}.{kind.lower()}", picture(number, kind)
        )
    return str(folder)


def tars(folder):
    return write_tars(folder, {f"{n}.tar": labelled(range(4 * n, 4 * n + 4)) for n in range(8)})


def tables(folder):
    for file in range(3):
        numbers = range(12 * file, 12 * file + 12)
        columns = {"image": [picture(n) for n in numbers], "label": [n % 3 for n in numbers]}
        write_table(Path(folder) / f"{file}.parquet", columns, rows_per_group=4)
    return str(folder)


def connect():
    os.environ.pop("RAY_ADDRESS", None)
    cluster.connect(cpus=8)


@pytest.fixture(scope="module")
def eight_cpus():
    """A process that drives a real cluster, which takes itself to have eight CPUs, so that eight tasks run at once.

    A process of its own: a token for a second cluster in one process is not taken up by Ray.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=connect) as process:
        yield process
        process.submit(cluster.disconnect).result()


@pytest.mark.system
@pytest.mark.parametrize("make", [images, tars, tables])
def test_one_task_and_eight_write_the_same_bytes_and_digest(tmp_path, make, eight_cpus):
    source = make(tmp_path / "source")
    listing = listed(source, tmp_path / "snapshot", test_share=0.3)
    one = sharded(source, listing, tmp_path / "one")
    eight = eight_cpus.submit(sharded, source, listing, tmp_path / "eight", executor="ray").result()
    assert eight.facts == one.facts
    assert all_objects(tmp_path / "eight", "shards/") == all_objects(tmp_path / "one", "shards/")
    assert all_objects(tmp_path / "eight", "rows/") == all_objects(tmp_path / "one", "rows/")
    assert one.facts["counts"]["total"]["stored"] >= 30


def shards_of(make, folder):
    source = make(folder / "source")
    shards = sharded(source, listed(source, folder / "snapshot"), folder / "root")
    paths = sorted(str(path) for path in (folder / "root" / "shards").rglob("*.tar"))
    assert len(paths) == manifest_of(shards).all_shards().num_rows >= 4
    return paths, {row["key"]: (row["data"], row["label"]) for row in stored(shards).values()}


def test_pythons_tarfile_and_webdataset_read_every_sample(tmp_path):
    for make in (images, tables):
        paths, ours = shards_of(make, tmp_path / make.__name__)
        theirs = {}
        for path in paths:
            with tarfile.open(path) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}
            for name, data in files.items():
                key, _, suffix = name.partition(".")
                if suffix == "jpg":
                    theirs[key] = (data, int(files[f"{key}.cls"]))
        assert theirs == ours
        read = webdataset.WebDataset(paths, shardshuffle=False)
        assert {item["__key__"]: (item["jpg"], int(item["cls"])) for item in read} == ours


def read_by_ray(paths):
    import ray

    return ray.data.read_webdataset(paths).take_all()


def test_ray_data_reads_every_sample(tmp_path, eight_cpus):
    paths, ours = shards_of(images, tmp_path)
    rows = eight_cpus.submit(read_by_ray, paths).result()
    assert len(rows) == len(ours) == 30
    for row in rows:  # its images come decoded
        data, label = ours.pop(row["__key__"])
        assert np.array_equal(row["jpg"], np.asarray(Image.open(io.BytesIO(data))))
        assert int(row["cls"]) == label
