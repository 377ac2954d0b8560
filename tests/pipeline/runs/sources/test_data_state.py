"""Which state of its data a run reads: changes are told, the newest snapshots are read, moved data are known again."""

import shutil

import pytest
import yaml
from data_kit import write_table
from run_kit import Silent, document, migrated_database, pictures, store, tars, write_config, write_images

from pipeline.config import load_config
from pipeline.graph.runner import GraphRun
from pipeline.runs import submission
from pipeline.runs.run import run_pipeline
from pipeline.runs.sources import changes as changes_module
from pipeline.runs.sources.refresh import snapshot_names
from pipeline.runs.sources.state import settled, settled_for_run
from pipeline.runs.workflow import build, parts_of_sources
from pipeline.storage import open_store

__all__ = ["migrated_database", "store"]


class Hooks(Silent):
    """The runner's hooks, silent."""

    tracking_uri = ""

    def begin(self, step):
        return ""

    def progress(self, *_):
        pass

    def end(self, outcome):
        assert outcome.error is None, outcome.error


def told(path, *overrides, look_for_new=False, record=False):
    """The settled configuration, and what was said."""
    lines: list[str] = []
    config = load_config(path, overrides)
    return settled_for_run(config, say=lines.append, look_for_new=look_for_new, record=record), lines


def make_data(config):
    """Run the steps before pretraining."""
    steps = [step for step in build(config) if step.kind in {"snapshot", "shard", "join"}]
    return {
        o.step.name: o.state
        for o in GraphRun(steps, store=open_store(config.store), executor="in_process", hooks=Hooks()).walk()
    }


@pytest.fixture
def source(tmp_path):
    return write_images(tmp_path / "images", 40)


@pytest.fixture
def path(tmp_path, source):
    return write_config(tmp_path / "run.yaml", document(tmp_path / "store", source))


def test_a_new_store_is_told_as_new_and_a_used_one_is_not(store, source, tmp_path):
    path = write_config(tmp_path / "run.yaml", document(store, source) | {"evaluation": {"datasets": []}})
    for new in (True, False):
        display = Silent()
        run_pipeline(load_config(path), executor="in_process", display=display)
        assert any(f"store {open_store(str(store)).uri} is new" in text for _, _, text in display.said) == new


def test_changes_of_the_source_are_told_in_one_line_with_what_refresh_would_do(path, source):
    make_data(told(path)[0])
    (source / "cat" / "0000.png").unlink()
    _, (line,) = told(path)
    assert line.startswith(
        f"data.source {source} has changed since snapshot 1, which this run reads: 1 file gone. --refresh would"
    )
    write_images(source / "new", 3, classes=(), seed=1)
    (source / "dog" / "0001.png").write_bytes(b"larger" * 1000)
    _, (line,) = told(path)
    assert (
        "3 files new, 1 file of another size, 1 file gone. --refresh takes in new and changed files as a new part"
        in line
    )
    assert snapshot_names(told(path)[0]) == ("1",)


def test_after_a_refresh_the_plain_command_reads_the_newest_state_unless_snapshots_are_written(path, source):
    make_data(told(path)[0])
    write_images(source / "new", 3, classes=(), seed=1)
    (source / "cat" / "0000.png").unlink()
    refreshed, _ = told(path, look_for_new=True)
    assert set(make_data(refreshed).values()) == {"cached", "done"}
    plain, (line,) = told(path)
    assert plain == refreshed
    assert line.endswith(f'this run reads the newest state of {source}: ["1", "2"]')  # and the missing file is no news
    assert settled(load_config(path)) == plain
    explicit, (line,) = told(path, 'data.snapshot="1"')
    assert snapshot_names(explicit) == ("1",)
    assert "3 files new, 1 file gone" in line


def test_a_submitted_run_leaves_the_snapshots_to_the_cluster_unless_they_are_written(path, monkeypatch):
    sent = []
    monkeypatch.setattr(submission, "submit_run", lambda _, text, address: sent.append(yaml.safe_load(text)) or "id")
    submission.submit(load_config(path), address="")
    submission.submit(load_config(path, ["data.snapshot=3"]), address="")
    assert [document["data"].get("snapshot") for document in sent] == [None, "3"]


def test_a_changed_labels_file_is_told(tmp_path, path, source):
    labels = tmp_path / "labels.csv"
    names = [f"{file.parent.name}/{file.name}" for file in source.glob("*/*")]
    labels.write_text("path,label\n" + "".join(f"{name},a\n" for name in names))
    given = f"data.labels={labels}"
    make_data(told(path, given)[0])
    assert told(path, given)[1] == []
    labels.write_text("path,label\n" + "".join(f"{name},b\n" for name in names))
    _, (line,) = told(path, given)
    assert line.startswith(f"data.labels {labels} has changed since snapshot 1")


def test_a_changed_table_beside_the_images_is_told_and_makes_moved_data_other_data(path, source, tmp_path):
    val = write_images(tmp_path / "flat", 4, classes=(), seed=1)
    for name in ("cat", "dog"):
        (source / "train" / name).parent.mkdir(exist_ok=True)
        (source / name).rename(source / "train" / name)
    val.rename(source / "val")
    table = source / "val" / "val_annotations.txt"
    table.write_text("".join(f"000{index}.png\tcat\n" for index in range(4)))
    first, _ = told(path)
    make_data(first)
    assert told(path)[1] == []
    there = f"data.source={moved(source, tmp_path)}"
    assert fingerprints(told(path, there)[0]) == fingerprints(first)
    (tmp_path / "elsewhere").rename(source)
    table.write_text(table.read_text().replace("cat", "dog"))
    _, (line,) = told(path)
    assert line.startswith(f"data.source {source}: val/val_annotations.txt has changed since snapshot 1")
    there = f"data.source={moved(source, tmp_path)}"
    assert told(path, there)[0].data.moved is None


def test_a_source_that_is_gone_is_a_line_and_no_failure(path, source):
    config, _ = told(path)
    make_data(config)
    shutil.rmtree(source)
    config, (line,) = told(path)
    assert line.startswith(f"data.source {source} could not be compared with snapshot 1, which this run reads: ")
    assert set(make_data(config).values()) == {"cached"}


def test_a_source_that_does_not_answer_is_given_up_on(path, monkeypatch):
    make_data(told(path)[0])
    monkeypatch.setattr(changes_module, "LIMIT_S", 0.01)
    monkeypatch.setattr(changes_module, "compare_source", lambda *_, **__: changes_module.threading.Event().wait(1))
    _, (line,) = told(path)
    assert line.endswith("it did not answer within 0.01 s")


def test_a_large_folder_is_sampled_and_the_line_says_so(path, source, monkeypatch):
    make_data(told(path)[0])
    monkeypatch.setattr(changes_module, "FULL", 10)
    assert told(path)[1] == [
        f"data.source {source}: no change since snapshot 1 in a sample of 40 of 40 files and the times of 3 folders"
    ]
    (source / "cat" / "more.png").write_bytes(b"new")
    (source / "dog" / "0001.png").write_bytes(b"larger" * 1000)
    (source / "dog" / "0003.png").unlink()
    _, (line,) = told(path)
    assert "1 file of another size, 1 file gone, 2 folders changed (such as cat), in a sample of 40 of 40 files" in line


def test_a_large_bucket_is_sampled_folder_by_folder(tmp_path, s3_bucket, source, monkeypatch):
    bucket = open_store(f"s3://{s3_bucket}/images")
    for file in source.glob("*/*"):
        bucket.upload(f"{file.parent.name}/{file.name}", file)
    path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", bucket.uri))
    make_data(told(path)[0])
    monkeypatch.setattr(changes_module, "FULL", 10)
    assert told(path)[1][0].endswith("no change since snapshot 1 in a sample of 2 of its folders (40 files are listed)")
    bucket.write("cat/0001.png", b"new")
    bucket.write("dog/0001.png", b"of another size")
    bucket.delete("dog/0039.png")
    assert "1 file new, 1 file of another size, 1 file gone, in a sample of 2" in told(path)[1][0]
    monkeypatch.setattr(changes_module, "_PAGE", 5)  # what lies behind the page is not taken for gone
    assert "1 file new, 1 file of another size, in a sample of 2" in told(path)[1][0]


def moved(source, tmp_path):
    shutil.copytree(source, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    shutil.rmtree(source)
    return tmp_path / "elsewhere"


def fingerprints(config):
    return {step.name: step.fingerprint for step in build(config)}


def test_data_that_moved_are_known_again_and_grow_at_their_new_address(path, source, tmp_path, monkeypatch):
    first, _ = told(path)
    make_data(first)
    there = f"data.source={moved(source, tmp_path)}"
    config, (line,) = told(path, there, record=True)
    assert line == (
        f"data.source {tmp_path / 'elsewhere'} holds the data that were listed at {source} (40 images): the run goes on under that "
        "address's fingerprints and repeats nothing"
    )
    assert fingerprints(config) == fingerprints(first) == fingerprints(settled(load_config(path, [there])))
    assert set(make_data(config).values()) == {"cached"}
    monkeypatch.setattr(
        changes_module, "FULL", 10
    )  # the folders of a copy are younger than the listing, and that is no news
    assert "no change since snapshot 1" in told(path, there)[1][1]
    monkeypatch.undo()
    write_images(tmp_path / "elsewhere" / "new", 3, classes=(), seed=1)  # remembered, and compared from now on
    config, lines = told(path, there)
    assert fingerprints(config) == fingerprints(first)
    assert "3 files new" in lines[1]
    config, _ = told(path, there, look_for_new=True)
    assert make_data(config)["shard.2"] == "done"


@pytest.mark.parametrize("change", ["a file more", "a file less", "other bytes of one size", "other settings"])
def test_data_that_are_not_the_same_are_not_taken_for_moved(path, source, tmp_path, change):
    first, _ = told(path)
    make_data(first)
    there = moved(source, tmp_path)
    given = [f"data.source={there}"]
    if change == "a file more":
        write_images(there / "new", 1, classes=(), seed=1)
    elif change == "a file less":
        (there / "cat" / "0000.png").unlink()
    elif change == "other bytes of one size":
        for file in there.glob("*/*.png"):  # a chunk of text behind the image keeps it readable
            data = file.read_bytes()
            file.write_bytes(data[:-12][::-1] + data[-12:])
    else:
        given.append("data.seed=5")
    config, lines = told(path, *given)
    assert lines == []
    assert config.data.moved is None
    assert not fingerprints(config).keys() & {n for n, f in fingerprints(config).items() if f == fingerprints(first)[n]}


def test_labels_and_datasets_to_evaluate_on_move_with_their_source(tmp_path, path, source):
    other = write_images(tmp_path / "other", 12, seed=2)
    labels = source / "labels.csv"
    labels.write_text("path,label\n" + "".join(f"{f.parent.name}/{f.name},a\n" for f in source.glob("*/*")))

    def given(data, dataset):
        chosen = f"[{{name: own}}, {{name: other, source: {dataset}}}]"
        return [f"data.source={data}", f"data.labels={data}/labels.csv", f"evaluation.datasets={chosen}"]

    first, _ = told(path, *given(source, other))
    make_data(first)
    there, elsewhere = moved(source, tmp_path), other.rename(tmp_path / "other2")
    config, lines = told(path, *given(there, elsewhere))
    assert [line.split(" holds")[0] for line in lines] == [
        f"data.source {there}",
        f"evaluation.datasets.1.source {elsewhere}",
    ]
    assert fingerprints(config) == fingerprints(first)
    text = (there / "labels.csv").read_text()
    (there / "labels.csv").write_text(text.replace(",a", ",b"))
    assert told(path, *given(there, elsewhere))[0].data.moved is None


def test_tables_that_moved_are_known_again_and_tars_are_told_to_be_indexed_again(tmp_path):
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables" / "all.parquet", {"image": pictures(40), "label": [n % 2 for n in range(40)]})
    tars(tmp_path / "tars")
    for kind, known in [("tables", True), ("tars", False)]:
        path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", tmp_path / kind))
        first, _ = told(path)
        make_data(first)
        there = (tmp_path / kind).rename(tmp_path / f"{kind}2")
        config, (line,) = told(path, f"data.source={there}")
        assert (fingerprints(config) == fingerprints(first)) == known
        assert line.startswith(f"data.source {there} holds" if known else f"{there} holds the tars that were listed at")


def test_parts_of_sources_are_those_of_the_graph(path):
    config = load_config(path, ["evaluation.datasets=[{name: a}, {name: b, source: /b}, {name: c, source: /b}]"])
    steps = {step.name: step.fingerprint for step in build(config)}
    parts = {section: [step.name for step in shards] for section, shards in parts_of_sources(config).items()}
    assert parts == {"data": ["shard"], "evaluation.datasets.1": ["shard-b"]}
    assert {step.fingerprint for shards in parts_of_sources(config).values() for step in shards} <= set(steps.values())
