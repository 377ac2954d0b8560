"""Benchmarks of the data path: what is compared does the same, and the JSON line has its keys. Times are not tested."""

import io
import json
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from benchmarks import _data, decode, leaks, loader, order, scale, shard
from pipeline.data.images.decode_speed import CROP, SIZE
from pipeline.data.images.photos import photos
from pipeline.data.images.pictures import is_mirrored
from pipeline.data.sharding.shard_plan import open_snapshot, plan_shards
from pipeline.data.sharding.shard_record import read_samples
from pipeline.data.sharding.shard_writer import write_shard
from pipeline.storage import open_store

# Keys that readers of the JSON line rely on; there may be more.
KEYS = {
    "decode": "ratio_vs_pillow share_of_bare max_diff mean_diff",
    "loader": "ratio_vs_webdataset ratio_vs_imagefolder images_per_s_per_core",
    "shard": "ratio_vs_shardwriter speedup_2_tasks",
    "order": "cold_seek_ms step_ms shards_per_batch_share_of_uniform",
}
TINY = {
    "decode": ["--chunks", "2", "--seconds", "0.01"],
    "loader": ["--batch", "4", "--batches", "2", "--rounds", "1"],
    "shard": ["--count", "8", "--rounds", "1"],
    "order": ["--samples", "64000", "--shards", "640", "--batch", "64", "--mixing-shards", "64"],
}


@pytest.fixture(scope="module")
def files():
    return photos(None, count=8).files


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    return _data.write_files(files, tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    "benchmark",
    [decode, loader, pytest.param(shard, marks=pytest.mark.system), order],
    ids=["decode", "loader", "shard", "order"],
)
def test_last_line_has_the_promised_keys(benchmark, folder, capsys):
    name = benchmark.__name__.rpartition(".")[2]
    benchmark.main(["--quick", "--images", str(folder), *TINY[name]])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == name
    expected = set(KEYS[name].split())
    assert expected <= set(line)
    # keys that need a second core, or a library outside our extras, may be null
    assert all(line[key] is not None for key in expected - {"ratio_vs_imagefolder", "speedup_2_tasks"})


@pytest.mark.parametrize("benchmark", [decode, loader, shard], ids=lambda module: module.__name__)
def test_a_folder_without_photographs_is_one_clear_line(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="holds no upright RGB JPEG"):
        benchmark.main(["--images", str(tmp_path)])


def torchvision_picture(sample, *, flipped):
    """Make the picture with torchvision's own calls, on our box."""
    with Image.open(io.BytesIO(sample.data)) as file:
        whole = file.convert("RGB")
    part = functional.resized_crop(whole, *sample.box, list(SIZE), functional.InterpolationMode.BICUBIC)
    return np.asarray(functional.hflip(part) if flipped else part)


def test_every_way_of_decoding_makes_the_same_picture(files):
    made = decode.samples(files, 16)
    assert {is_mirrored(sample.uniforms, CROP) for sample in made} == {False, True}
    # two kernels of one filter differ by 4 grey levels at worst and 0.06 on average over 64 crops; a box moved by a pixel by 7
    largest, average = decode.differences(made)
    assert largest <= 15
    assert average < 0.15
    for sample in made:
        ours = decode.ours(sample)
        pillow = decode.pillow(sample)
        flipped = is_mirrored(sample.uniforms, CROP)
        np.testing.assert_array_equal(pillow, torchvision_picture(sample, flipped=flipped))
        bare, half = decode.bare(sample), decode.pillow_then_torch(sample)
        unflipped = ours[:, ::-1] if flipped else ours
        np.testing.assert_array_equal(bare[0].permute(1, 2, 0).numpy(), unflipped)
        torch.testing.assert_close(half, bare, rtol=0, atol=0)
        np.testing.assert_array_equal(decode.simplejpeg_then_pillow(sample), pillow[:, ::-1] if flipped else pillow)


def test_all_loaders_yield_pictures_of_the_same_kind_from_the_same_shards(folder, files, tmp_path):
    plan = loader.Plan(workers=1, batch=16, timed=4, warmup=0, rounds=1)
    manifest = _data.sharded(folder, tmp_path, shards=2)
    assert manifest.counts.total.served == len(files)
    tars = [manifest.root.local_path(key) for key in manifest.shards("train").column("key").to_pylist()]
    sides = {
        "ours": loader.ours(manifest, plan, tmp_path),
        "webdataset": loader.webdataset(tars, plan),
    }
    means = {}
    for name, side in sides.items():
        batches = [next(side) for _ in range(4)]
        assert all(batch.dtype == torch.uint8 and batch.shape == (16, 224, 224, 3) for batch in batches)
        means[name] = float(torch.cat(batches).float().mean())
        side.close()
    # means of 64 crops of 8 photographs differed by less than 5 of 137 grey levels in 12 draws
    assert means["ours"] == pytest.approx(means["webdataset"], abs=15)


def test_ratios_are_taken_within_a_turn():
    # the machine is ten times slower in the second turn, which must not matter
    assert _data.ratios([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == (2.0, 2.0, 2.0)
    assert _data.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert _data.spread([7.0]) == (7.0, 7.0, 7.0)


def test_the_loop_around_shardwriter_records_what_our_rows_record(folder, tmp_path):
    listing = _data.listed(folder, tmp_path / "snapshot")
    with open_snapshot(listing.store) as snapshot:
        plans = list(plan_shards(snapshot, seed=0, shard_max_bytes=2**27, min_shards=2, policy=shard._POLICY))
    theirs = shard.write_with_shardwriter(plans, folder, tmp_path / "theirs", shard.our_checks)
    write = partial(write_shard, source=str(folder), root_uri=str(tmp_path / "ours"), policy=shard._POLICY)
    root = open_store(str(tmp_path / "ours"))
    ours = [row for plan in plans for row in read_samples(root, write(plan)).select(list(theirs[0])).to_pylist()]
    assert theirs == ours
    # Pillow's checks keep what ours keep; its decoder is the same library, so perceptual hashes agree too
    assert shard.write_with_shardwriter(plans, folder, tmp_path / "pillow", shard.pillow_checks) == ours


def test_a_variant_that_loses_images_is_refused(tmp_path):
    def loses(folder):
        folder.mkdir()
        return 7

    with pytest.raises(ValueError, match="stored 7 of 8 images"):
        shard.seconds_of({"loses": loses}, tmp_path, images=8, rounds=1)


def test_mixing_by_hand():
    # 100 shards of 10 samples, one class per shard; one batch from the first shard only, one with a sample from every shard
    alone, every = np.arange(10), np.arange(0, 1000, 10)
    assert order.mixing(iter([alone]), shards=100, per_shard=10) == (1.0, pytest.approx(0.99))
    assert order.mixing(iter([every]), shards=100, per_shard=10) == (100.0, pytest.approx(0.0))
    assert order.mixing(iter([alone, every]), shards=100, per_shard=10) == (50.5, pytest.approx(0.495))


@pytest.mark.parametrize(
    "way",
    [order.uniform, partial(order.ours, window_shards=1), order.shard_shuffle_and_buffer],
    ids=[
        "uniform",
        "ours",
        "buffer",
    ],  # the repr of a function holds its address, but xdist's workers must agree on names
)
def test_no_order_yields_a_sample_twice(way):
    samples = np.concatenate(list(way(64, 100, 64)))
    assert len(samples) >= 64 * 64
    assert len(np.unique(samples)) == len(samples)
    assert samples.max() < 6400


@pytest.mark.system
def test_scale_measures_every_part(capsys):
    scale.main(["--images", "3000"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["images"] == 3000
    parts = [part.replace(" ", "_") for part in scale.PARTS]
    assert all(line[part]["seconds"] > 0 for part in parts)


def test_a_short_peak_of_memory_is_seen():
    held = scale.measured(lambda: time.sleep(0.05 * np.ones(2**24).min()))  # 128 MiB
    assert 100 < held.mib < 200


def test_the_leak_check_is_scored_on_a_folder_with_a_list_of_pairs(files, tmp_path, capsys):
    for split, number, data in (
        ("train", 0, files[0]),
        ("train", 1, files[1]),
        ("test", 0, files[2]),
        ("test", 1, files[1]),
    ):
        path = tmp_path / split / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "test" / "2.jpg").write_bytes(files[0])
    (tmp_path / "pairs.csv").write_text("TestID,TrainID,Judgment\n0,1,1\n1,1,0\n2,0,2\n")
    cases = [leaks.folder_case(tmp_path), *leaks.synthetic_cases(2)]
    line = leaks.measure(iter(cases))
    scored = line["cases"][tmp_path.name]
    # 1 is found, 0 is listed by mistake and not found, and 2 is an alarm that the list does not count
    assert (scored["recall"], scored["alarms"]) == (0.5, 2)
    assert scored["false_per_10000"] == pytest.approx(1e4 / 3, abs=0.1)
    assert line["cases"]["synthetic, grey"]["recall"] == 1
    assert "1 of 2 (50.0%)" in capsys.readouterr().out
    # pairs without a judgment are right, and not asked for
    (tmp_path / "more.csv").write_text("TestID,TrainID\n2,0\n")
    assert leaks.outcome(leaks.folder_case(tmp_path)).false == 0
