"""Photographs for benchmarks, and the benchmark: it times the loader's work, on the requested number of threads."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import decode_speed
from pipeline.data.images.decode_speed import crops, decode_rate, images_per_s, training_picture
from pipeline.data.images.photos import photos, synthetic
from pipeline.data.images.pictures import augment, decode
from pipeline.errors import ConfigError


def encoded(mode: str = "RGB", size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 100).save(buffer, kind)
    return buffer.getvalue()


def test_synthetic_photographs_are_determined_by_their_numbers():
    assert synthetic(3) == synthetic(3)
    assert synthetic(3) != synthetic(13)
    with Image.open(io.BytesIO(synthetic(6))) as image:
        assert (image.size, image.mode, image.format) == ((375, 500), "RGB", "JPEG")


def test_synthetic_photographs_are_as_large_as_imagenet_s():
    # 88 KB over 50 of them: decoding time depends on bytes
    assert 78_000 < np.mean([len(data) for data in photos(None, count=12).files]) < 98_000


def test_a_folder_s_photographs_are_those_a_shard_keeps(tmp_path):
    good = encoded()
    for name, data in {
        "a/kept.jpg": good,
        "b/kept.JPEG": good,
        "grey.jpg": encoded("L"),
        "large.jpg": encoded(size=(600, 520)),
        "format.png": encoded(kind="PNG"),
        "broken.jpg": good[:200],
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found = photos(tmp_path, count=10)
    assert found.files == (good, good)
    assert str(tmp_path) in found.words
    assert len(photos(tmp_path, count=1).files) == 1
    with pytest.raises(ConfigError, match="is not a folder"):
        photos(tmp_path / "nowhere", count=1)


def test_the_timed_picture_is_the_loader_s():
    data, numbers = synthetic(0), crops(2)[1]
    expected = augment(decode(data), numbers, decode_speed.CROP, (224, 224))
    np.testing.assert_array_equal(training_picture(data, numbers), expected)


@pytest.mark.parametrize("threads_per_process", [8, 1])
def test_threads_and_processes_count_what_they_make(monkeypatch, threads_per_process):
    monkeypatch.setattr(decode_speed, "_THREADS_PER_PROCESS", threads_per_process)
    rate = decode_rate([encoded()] * 3, threads=2, seconds=0.2)
    assert rate.threads == 2
    # two threads make at most what two cores can; a quarter more for the resolution of the clocks
    assert 0 < rate.images_per_s < 2.5 * rate.images_per_core_s


def test_images_per_second_by_hand():
    assert images_per_s(1e12, peak=400e12, share_of_peak=0.5) == 200.0
    with pytest.raises(ConfigError, match=r"write 0\.4 for 40 %"):
        images_per_s(1e12, peak=400e12, share_of_peak=40)
