"""All damage by which WebDataset readers silently lose samples is found, named and repaired, on shards of the real stages."""

import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import webdataset
from data_kit import Bar, picture, tar_bytes, write_tars
from run_kit import document

from pipeline.config import RunConfig
from pipeline.data.dataset.integrity import check_shard, check_totals
from pipeline.data.dataset.manifest import Manifest
from pipeline.errors import DataError
from pipeline.graph.runner import GraphRun
from pipeline.runs.finished.datasets import dataset_in, datasets_of
from pipeline.runs.finished.verification import verify
from pipeline.runs.workflow import build
from pipeline.storage import open_store


class Hooks:
    tracking_uri = ""

    def begin(self, step):
        return ""

    def progress(self, *said):
        pass

    def end(self, outcome):
        assert outcome.state in {"done", "cached"}, outcome.error


def configured(store: str, source: Path, **data):
    whole = document(store, source)
    return RunConfig.model_validate(whole | {"data": whole["data"] | {"min_shards": 3} | data})


class Made:
    """A dataset made by the real steps, and what a test does to it."""

    def __init__(self, folder: Path, source: Path, **data):
        self.config = configured(str(folder / "store"), source, **data)
        self.states = self.run()
        self.dataset = datasets_of(self.config)[0]
        self.root = Path(open_store(self.dataset.step_uri).root)

    def run(self):
        """Run the steps up to the shards, as `mae run` would, and return their states."""
        steps = [step for step in build(self.config) if step.name.startswith(("snapshot", "shard", "join"))]
        walk = GraphRun(steps, store=open_store(self.config.store), executor="in_process", hooks=Hooks())
        return {outcome.step.name: outcome.state for outcome in walk.walk()}

    def verified(self):
        return verify(datasets_of(self.config)[0], executor="in_process", progress=Bar())

    def findings(self):
        return self.verified().findings

    @property
    def manifest(self) -> Manifest:
        return self.dataset.address.open()

    @property
    def lines(self):
        return self.manifest.all_shards().to_pylist()

    def tar(self, shard: int) -> Path:
        return Path(open_store(self.dataset.address.root_uri).root) / self.lines[shard]["key"]

    def rows(self, shard: int):
        return self.manifest.stored_samples(shard).to_pylist()

    def written(self):
        """Return path -> (inode, bytes), which changes for every file that is written again."""
        files = [path for path in (Path(self.config.store)).rglob("*") if path.is_file()]
        return {path: (path.stat().st_ino, path.read_bytes()) for path in files}


@pytest.fixture
def source(tmp_path):
    """60 pictures in two classes, two of them equal."""
    for number in range(60):
        path = tmp_path / "source" / ("cat" if number % 2 else "dog") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number if number != 59 else 57))
    return tmp_path / "source"


@pytest.fixture
def made(tmp_path, source):
    made = Made(tmp_path, source)
    assert made.verified().clean
    return made


def webdataset_keys(path):
    """Return what a plain reader yields with the handler that people use."""
    data = webdataset.WebDataset([str(path)], shardshuffle=False, handler=webdataset.ignore_and_continue)
    return [sample["__key__"] for sample in data]


def headers(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def repaired(made, findings):
    """Do what the findings say and only that, then repeat the run."""
    before = made.written()
    for address in {address for finding in findings for address in finding.delete}:
        Path(address.removeprefix("file://")).unlink()
    states = made.run()
    after = made.written()
    return states, {path for path, held in after.items() if before.get(path) != held}


# --- damages of one shard --------------------------------------------------------------------------------------------------


def cut_at_a_header(path, rows):
    at = headers(path)[2 * 11]
    path.write_bytes(path.read_bytes()[:at])
    return rows[11], "cut", "ends after .* without an end marker"


def cut_inside_a_body(path, rows):
    path.write_bytes(path.read_bytes()[: rows[7]["offset"] + 100])
    return rows[7], "cut", "unexpected end of data"


def a_bit_of_a_header(path, rows):
    flip(path, headers(path)[2 * 5] + 3)
    return rows[5], "header", "the header after .* is damaged"


def a_byte_of_an_image(path, rows):
    flip(path, rows[4]["offset"] + rows[4]["length"] // 2, 0xFF)
    return rows[4], "bytes", "SHA-256 is not the one"


def nothing_there(path, rows):
    path.unlink()
    return rows[0], "missing", f"no such object; it held {len(rows)} samples"


def zeros_after_the_end(path, rows):
    with path.open("ab") as file:
        file.write(bytes(10240))
    return None, "trailing", "10240 bytes follow its end; its own .* are intact$"


def another_tar_after_the_end(path, rows):
    with path.open("ab") as file:
        file.write(tar_bytes([("smuggled.jpg", picture(99))]))
    return None, "trailing", "something follows the end"


def another_mtime(path, rows):
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            content = old.extractfile(member)
            member.mtime = 1_700_000_000
            new.addfile(member, content)
    path.write_bytes(buffer.getvalue()[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))
    return None, "header", "every sample is intact, but headers"


def keys_with_dots(path, rows):
    members = [(f"img.v1.{number}.jpg", picture(number)) for number in range(len(rows))]
    path.write_bytes(tar_bytes(members))
    return rows[0], "any", r"'img' in the tar and '\d{12}' in the manifest \(1 samples, \d+ in the manifest\)"


def another_label(path, rows):
    with tarfile.open(path) as tar:
        member = [member for member in tar if member.name.endswith(".cls")][3]
    flip(path, member.offset_data)
    return rows[3], "any", r"its \.cls says '[01]', its label in the manifest is [01]"


DAMAGES = [
    cut_at_a_header,
    cut_inside_a_body,
    a_bit_of_a_header,
    a_byte_of_an_image,
    nothing_there,
    zeros_after_the_end,
    another_tar_after_the_end,
    another_mtime,
    keys_with_dots,
    another_label,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_repaired(damage, made):
    path, rows, first = made.tar(1), made.rows(1), made.lines[1]
    assert len(rows) > 12
    held = path.read_bytes()
    row, kind, words = damage(path, rows)

    verification = made.verified()
    findings = verification.findings
    assert not verification.clean
    assert {finding.shard for finding in findings} == {1}
    assert all(str(path) in finding.where for finding in findings)
    matching = [finding for finding in findings if kind in {"any", finding.damage}]
    (found,) = [finding for finding in matching if re.search(words, finding.what)]
    assert (found.sample, found.source) == ((row["key"], row["source"]) if row else ("", ""))

    states, changed = repaired(made, findings)
    assert states == {"snapshot": "cached", "shard": "done"}
    assert path.read_bytes() == held
    assert {changed_path.suffix for changed_path in changed if "shards" in changed_path.parts} == {".tar"}
    assert [changed_path for changed_path in changed if "shards" in changed_path.parts] == [path]
    assert len([changed_path for changed_path in changed if "rows" in changed_path.parts]) <= 1
    assert made.verified().clean
    assert made.lines[1] == first
    assert datasets_of(made.config)[0].receipt.facts == made.dataset.receipt.facts
    assert made.run() == {"snapshot": "cached", "shard": "cached"}


def test_what_webdataset_silently_loses_is_reported(made):
    path, rows = made.tar(0), made.rows(0)
    cut_at_a_header(path, rows)
    left = len(webdataset_keys(path))
    (finding,) = made.findings()
    assert left == 11
    assert finding.what.endswith(f"webdataset reads {left} of {len(rows)} samples and says nothing")


def test_a_cut_body_makes_webdataset_fail(made):
    cut_inside_a_body(made.tar(0), made.rows(0))
    (finding,) = made.findings()
    assert "webdataset reads 7 of" in finding.what
    assert finding.what.endswith("samples and fails")


def test_a_flipped_byte_names_the_sample_and_the_checksum(made):
    row = made.rows(0)[4]
    flip(made.tar(0), row["offset"] + row["length"] // 2, 0xFF)
    tar, sample = made.findings()
    assert (tar.damage, sample.damage) == ("bytes", "bytes")
    assert (sample.sample, sample.source) == (row["key"], row["source"])
    assert f"written was {row['crc32']}" in sample.what


@pytest.mark.parametrize("at", range(0, 512, 37))
def test_no_bit_of_a_header_goes_unseen(at, made):
    path = made.tar(2)
    flip(path, headers(path)[4] + at, 1 << at % 8)
    assert made.findings()


def test_many_damaged_samples_are_named_in_part_and_counted(made):
    path, rows = made.tar(0), made.rows(0)
    for row in rows:
        flip(path, row["offset"] + row["length"] // 2, 0xFF)
    findings = made.findings()
    assert findings[-1].what == f"{len(rows)} of {len(rows)} samples in all are damaged"
    assert len(findings) == 7


# --- more than one shard, and the tables -----------------------------------------------------------------------------------


def test_two_shards_swapped_are_two_findings(made):
    first, second = made.tar(0), made.tar(1)
    held = first.read_bytes(), second.read_bytes()
    first.write_bytes(held[1])
    second.write_bytes(held[0])
    findings = made.findings()
    assert [(finding.damage, finding.shard, finding.what) for finding in findings] == [
        ("swapped", 0, "it holds the bytes of shard 1, not its own"),
        ("swapped", 1, "it holds the bytes of shard 0, not its own"),
    ]
    _, changed = repaired(made, findings)
    assert {path for path in changed if "shards" in path.parts} == {first, second}
    assert (first.read_bytes(), second.read_bytes()) == held
    assert made.verified().clean


def test_tables_of_another_run_are_reported_alone_and_rewritten(made, tmp_path, source):
    other = Made(tmp_path / "other", source, seed=5)
    table = Path(made.dataset.address.manifest_uri.removeprefix("file://")) / "samples.parquet"
    mine = table.read_bytes()
    theirs = Path(other.dataset.address.manifest_uri.removeprefix("file://")) / "samples.parquet"
    table.write_bytes(theirs.read_bytes())
    (finding,) = made.findings()
    assert (finding.damage, finding.shard) == ("manifest", None)
    assert finding.where.endswith("/samples.parquet")
    assert "damaged, or of another run" in finding.what
    states, changed = repaired(made, [finding])
    assert states["shard"] == "done"
    assert not [path for path in changed if {"shards", "rows"} & set(path.parts)]
    assert made.verified().clean
    assert (
        Path(datasets_of(made.config)[0].address.manifest_uri.removeprefix("file://"), "samples.parquet").read_bytes()
        == mine
    )


@pytest.mark.parametrize("name", ["samples.parquet", "shards.parquet", "quarantine.parquet", "manifest.json"])
def test_a_missing_table_is_reported_and_rewritten(name, made):
    Path(made.dataset.address.manifest_uri.removeprefix("file://"), name).unlink()
    (finding,) = made.findings()
    assert finding.where.endswith(f"/{name}")
    repaired(made, [finding])
    assert made.verified().clean


def test_orphans_are_reported_and_may_be_deleted(made):
    orphan = made.root / "shards" / "00" / f"{'0' * 64}.tar"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"x" * 100)
    (finding,) = made.findings()
    assert (finding.damage, finding.delete) == ("orphan", (orphan.as_uri(),))
    assert "100 bytes that are not part of this dataset" in finding.what
    orphan.unlink()
    assert made.verified().clean


# --- rows that the bytes contradict ------------------------------------------------------------------------------------------


def forged(made, shard, place, **changes):
    """Return the findings if a row says something else."""
    manifest = made.manifest
    rows = made.rows(shard)
    rows[place] = rows[place] | changes
    return check_shard(manifest.root, made.lines[shard], rows, labels="numbers").findings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 31}, "it is 32 x 24 pixels, the manifest says 31 x 24"),
        ({"key": "other"}, "in the tar and 'other' in the manifest"),
        ({"crc32": 1}, "written was 1"),
        ({"sha256": "0" * 64}, "have changed"),
        ({"label": -1}, "its label in the manifest is -1"),
    ],
)
def test_a_row_that_lies_is_found(made, changes, words):
    findings = forged(made, 0, 2, **changes)
    assert any(words in finding.what for finding in findings), findings


def test_a_row_too_many_or_too_few_is_found(made):
    root, line, rows = made.manifest.root, made.lines[0], made.rows(0)
    (few,) = check_shard(root, line, rows[:-1], labels="numbers").findings
    assert f"the first one too many is '{rows[-1]['key']}'" in few.what
    moved = rows[-1] | {"key": "999999999999"}
    (many,) = check_shard(root, line, [*rows, moved], labels="numbers").findings
    assert f"sample {len(rows) + 1} is None in the tar and '999999999999' in the manifest" in many.what


def test_totals_that_do_not_add_up_are_found(made):
    lines, manifest = made.lines, made.manifest
    reports = [check_shard(manifest.root, line, made.rows(line["shard"]), labels="numbers") for line in lines]
    assert check_totals(lines, reports, manifest.counts, "m") == []
    (of_samples, of_shards) = check_totals(lines[1:], reports[1:], manifest.counts, "m")
    assert "samples.parquet has" in of_samples.what
    assert "shards.parquet has" in of_shards.what


# --- indexed tars, parts, and wrong addresses ----------------------------------------------------------------------------------


def foreign(tmp_path):
    """Index tars of others with quarantined samples: keys with dots that merge into one sample, and a text."""
    tars = {
        f"train-{name}.tar": [
            *[(f"{name}{number}.jpg", picture(10 * name + number)) for number in range(5)],
            ("dots.v1.jpg", picture(200 + name)),
            ("dots.v2.jpg", picture(300 + name)),
            ("zzz.jpg", b"no image"),
        ]
        for name in range(3)
    }
    return Path(write_tars(tmp_path / "foreign", tars))


def test_indexed_tars_are_verified_in_place(tmp_path):
    source = foreign(tmp_path)
    made = Made(tmp_path, source, bad_share_stop=0.5)
    verification = made.verified()
    assert verification.clean
    assert verification.samples == 15
    path = source / "train-1.tar"
    held = path.read_bytes()
    row = made.rows(1)[2]
    flip(path, row["offset"] + 300)
    tar, sample = made.findings()
    assert (sample.sample, sample.source) == ("12", "train-1.tar/12.jpg")
    assert tar.where == path.as_uri()
    assert (tar.delete, sample.delete) == ((), ())
    assert "restore the tar from its origin" in tar.repair
    path.write_bytes(held)
    assert made.verified().clean


def test_tars_with_links_and_files_of_a_mac_are_verified(tmp_path):
    folder = tmp_path / "made" / "cat"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(picture(number))
        (folder / f"._{number}.jpg").write_bytes(b"\0\5\x16\7")
        (folder / f"{number}.cls").write_bytes(b"%d" % (number % 2))
    os.link(folder / "0.jpg", folder / "6.jpg")
    (folder / "7.jpg").symlink_to("1.jpg")
    source = tmp_path / "foreign"
    source.mkdir()
    with tarfile.open(source / "train-0.tar", "w") as tar:
        # ._0.jpg, 0.jpg, ._0.cls would be three samples to webdataset, and 6.jpg and 7.jpg none
        for path in sorted(folder.iterdir(), key=lambda path: (path.name.removeprefix("._"), path.name)):
            tar.add(path, f"cat/{path.name}")
    made = Made(tmp_path, source)
    verification = made.verified()
    assert [finding.what for finding in verification.findings] == []
    assert verification.samples == 8


def test_a_part_is_repaired_in_its_own_step(tmp_path, source):
    config = Made(tmp_path, source).config
    (source / "dog" / "new.jpg").write_bytes(picture(500))
    for number in range(20):
        (source / "cat" / f"new{number}.jpg").write_bytes(picture(600 + number))
    made = Made(tmp_path, source, snapshot=["1", "2"])
    assert made.states["join"] == "done"
    assert made.verified().clean
    assert made.verified().step == "join"
    shard = next(line["shard"] for line in made.lines if line["key"].startswith("shard.2-"))
    path = made.tar(shard)
    held = path.read_bytes()
    path.write_bytes(held[:5000])
    findings = made.findings()
    states, changed = repaired(made, findings)
    assert (states["shard"], states["shard.2"], states["join"]) == ("cached", "done", "cached")
    assert [changed_path for changed_path in changed if "shards" in changed_path.parts] == [path]
    assert made.verified().clean
    assert config.store == made.config.store


def test_a_dataset_in_a_bucket_is_verified(tmp_path, source, s3_bucket):
    made = Made.__new__(Made)
    made.config = configured(f"s3://{s3_bucket}/run", source)
    made.run()
    assert made.verified().clean
    dataset = datasets_of(made.config)[0]
    store = open_store(dataset.address.root_uri)
    line = dataset.address.open().all_shards().to_pylist()[0]
    store.delete(line["key"])
    (finding,) = made.findings()
    assert finding.damage == "missing"
    for address in finding.delete:
        folder, _, name = address.rpartition("/")
        open_store(folder).delete(name)
    made.run()
    assert made.verified().clean


def test_the_directory_of_a_step_is_enough(made, tmp_path):
    assert dataset_in(made.dataset.step_uri).receipt == made.dataset.receipt
    with pytest.raises(
        DataError, match=r"there is no receipt, so this is not a finished shard or join step\. Give the directory"
    ):
        dataset_in(str(tmp_path))
    snapshot_step = next(Path(made.config.store).glob("snapshot-*"))
    with pytest.raises(DataError, match="the receipt is of snapshot, so this is not"):
        dataset_in(str(snapshot_step))
    unmade = made.config.model_copy(update={"store": str(tmp_path / "empty")})
    with pytest.raises(DataError, match=r"shards of this configuration do not exist yet\. `mae run` makes them"):
        datasets_of(unmade)


def test_neither_a_verification_nor_the_same_run_again_writes_a_byte(made):
    before = made.written()
    assert made.verified().clean
    assert made.run() == {"snapshot": "cached", "shard": "cached"}
    assert made.written() == before
