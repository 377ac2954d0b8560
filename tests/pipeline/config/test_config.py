"""Reading a configuration: what is refused and with which message, what is accepted, and what enters the fingerprints."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from run_kit import MODEL, ROOT, document, write_config

from mae_core.config import SIZES
from pipeline.cluster.resources import Resources
from pipeline.config import RunConfig, load_config, read_document
from pipeline.errors import ConfigError
from pipeline.graph.plan import nearest_difference
from pipeline.graph.step import canonical
from pipeline.runs.workflow import build

JARGON = ("Input should", "Value error", "validation error", "pydantic", "type=", "dictionary", "tuple", "None")


@pytest.fixture
def path(tmp_path) -> Path:
    return write_config(tmp_path / "run.yaml", document("/data/store", "/data/images"))


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def complaint_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "written.yaml"
    path.write_text(text)
    return complaint(path).replace(str(path), "FILE")


# --- what is refused, with which message -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # unknown keys: at the top, in sections, in mae_core's dataclasses, in lists
        ("modle.size=tiny", "modle is not a field; did you mean model?"),
        ("pretrain.epoch=3", "pretrain.epoch is not a field; did you mean epochs?"),
        ("model.encoder.patchsize=4", "model.encoder.patchsize is not a field; did you mean patch_size?"),
        ("pretrain.augment.scael=1", "pretrain.augment.scael is not a field; did you mean scale?"),
        (
            "evaluation.finetune.layr_decay=1",
            "evaluation.finetune.layr_decay is not a field; did you mean layer_decay?",
        ),
        (
            "evaluation.datasets=[{name: a, sorce: x}]",
            "evaluation.datasets.0.sorce is not a field; did you mean source?",
        ),
        ("tracking.zzz=1", "tracking.zzz is not a field; the fields here are uri, experiment"),
        # wrong types
        ("pretrain.epochs=three", "pretrain.epochs = 'three' is not a whole number"),
        ("pretrain.epochs=2.5", "pretrain.epochs = 2.5 is not a whole number"),
        ("pretrain.epochs=yes", "pretrain.epochs = True is not a number: YAML reads yes, no, on, off as true or false"),
        ("evaluation.seeds=[0, on]", "evaluation.seeds.1 = True is not a number"),
        ("pretrain.base_lr=fast", "pretrain.base_lr = 'fast' is not a number"),
        ("pretrain.base_lr=.inf", "pretrain.base_lr = inf is not a finite number"),
        ("data.test_share=.nan", "data.test_share = nan is not a finite number"),
        ("store=5", "store = 5 is not text: write it in quotes"),
        ("resources.use_gpu=maybe", "resources.use_gpu = 'maybe': write auto, true or false"),
        ("model.encoder.image_size=wide", "model.encoder.image_size = 'wide' is not a list: write [a, b]"),
        ("model.encoder.image_size=yes", "model.encoder.image_size = True is not a list: write [a, b]"),
        (
            "model.encoder.patch_size=64",
            "model.encoder.patch_size = 64 is larger than the height in image_size=(16, 16): write a patch_size that divides 16, "
            "or a larger image_size",
        ),
        ("pretrain.betas=[0.9]", "pretrain.betas = [0.9] has too few values"),
        ("pretrain.augment=3", "pretrain.augment = 3 is not a section: write its fields below it"),
        ("evaluation.datasets=[7]", "evaluation.datasets.0 = 7 is not a section: write its fields below it"),
        ("model=7", "model = 7 is not a section: write its fields below it"),
        ("resources.workers=two", "resources.workers = 'two': write a number from 1, or [min, max]"),
        ("resources.workers=[2, x]", "resources.workers = [2, 'x']: write a number from 1, or [min, max]"),
        ("resources.decode_workers=many", "resources.decode_workers = 'many': write auto, or a number from 0"),
        ("resources.evaluation_workers=0", "resources.evaluation_workers = 0: write a number from 1, or [min, max]"),
        (
            "resources.evaluation_workers=two",
            "resources.evaluation_workers = 'two': write a number from 1, or [min, max]",
        ),
        ("resources.parallel_steps=0", "resources.parallel_steps = 0: write auto, or a number from 1"),
        ("resources.parallel_steps=many", "resources.parallel_steps = 'many': write auto, or a number from 1"),
        ("resources.decode_workers=-1", "resources.decode_workers = -1: write auto, or a number from 0"),
        # empty and missing values
        ("data.source=", "data.source is empty: give it a value, or leave it out"),
        ("store=''", "store is empty: write a folder or s3://bucket/prefix"),
        ("tracking.experiment=''", "tracking.experiment = '' is empty: write a name"),
        ("evaluation.datasets=[{}]", "evaluation.datasets.0.name is missing; add it"),
        # impossible values
        ("seed=-1", "seed = -1 is too small: write 0 or more"),
        ("evaluation.seeds=[-1]", "evaluation.seeds.0 = -1 is too small: write 0 or more"),
        ("data.test_share=1", "data.test_share = 1 is too large: write less than 1.0"),
        ("data.bad_share_stop=2", "data.bad_share_stop = 2 is too large: write 1.0 or less"),
        ("resources.cpus_per_worker=0", "resources.cpus_per_worker = 0 is too small: write more than 0.0"),
        ("resources.workers=0", "resources.workers = 0: write a number from 1, or [min, max]"),
        (
            "resources.wall_clock_s=60",
            "resources.wall_clock_s = 60 leaves no time to train: write more than grace_s=120",
        ),
        ("resources.workers=[4, 2]", "resources.workers = (4, 2): write a number from 1, or [min, max]"),
        ("resources.zero_stage=4", "resources.zero_stage = 4 is unknown: write 1, 2 or 3"),
        ("pretrain.precision=fp16", "pretrain.precision = 'fp16' is unknown: write 'bf16', 'fp32' or 'tf32'"),
        (
            "evaluation.datasets.0.protocols=[nearest]",
            "evaluation.datasets.0.protocols.0 = 'nearest' is unknown: write 'linear'",
        ),
        ("evaluation.datasets.0.protocols=[linear, linear]", "protocols = ['linear', 'linear']: write each only once"),
        ("evaluation.datasets=[{name: a}, {name: a}]", "evaluation.datasets = ['a', 'a'] has a name twice"),
        (
            "evaluation.datasets.0.name=A B",
            "evaluation.datasets.0.name = 'A B' is not usable: write 1 to 32 lower-case letters",
        ),
        ("evaluation.seeds=0", "evaluation.seeds = 0: write how many, from 1 to 1000, or a list of seeds such as [0]"),
        ("evaluation.seeds=true", "evaluation.seeds = True is not a list: write [a, b]"),
        (
            "evaluation.knn.other_k=[20]",
            "evaluation.knn.other_k = [20] beside k=20: write numbers from 1, each only once",
        ),
        ("evaluation.ridge.labels_per_class=[]", "evaluation.ridge.labels_per_class = []: write at least one number"),
        ("evaluation.seeds=[]", "evaluation.seeds = []: write at least one, and each only once"),
        ("name=a/b", "name = 'a/b' is not usable: write 1 to 64 letters, digits, dots, _ or -"),
        ("model.size=gigantic", "model.size = 'gigantic' is unknown: write one of tiny, small, base, large, huge"),
        ("model.size=[base]", "model.size = ['base'] is unknown"),
        ("model.mask_ratio=1.5", "model.mask_ratio = 1.5 of 16 patches leaves -8 visible"),
        ("model.encoder.image_size=[15, 16]", "model.encoder.image_size = (15, 16): height 15 is not a multiple of"),
        ("model.encoder.num_heads=0", "model.encoder.num_heads = 0 is not positive: write a number above 0"),
        ("pretrain.warmup_epochs=5", "pretrain.warmup_epochs = 5.0 is not in [0, epochs=2): write fewer"),
        ("evaluation.linear.warmup_epochs=2", "evaluation.linear.warmup_epochs = 2.0 is not in [0, epochs=2)"),
        ("pretrain.weight_decay=-1", "pretrain.weight_decay = -1.0 is not 0 or more: write 0 for none"),
        ("pretrain.betas=[0.9, 1.0]", "pretrain.betas = (0.9, 1.0) are not both in [0, 1)"),
        ("evaluation.finetune.drop_path=1", "evaluation.finetune.drop_path = 1.0 is not in [0, 1): write 0 for none"),
        ("evaluation.finetune.layer_decay=0", "evaluation.finetune.layer_decay = 0.0 is not in (0, 1]"),
        ("store=ftp://x/y", "store: store address 'ftp://x/y' is not usable: write file:///absolute/folder"),
        ("data.source=s3:/bucket", "data.source: 's3:/bucket' has one slash too few: write s3://bucket"),
        ("data.source=s3://b/../c", "data.source: s3://b/../c: '../c' is not a valid key"),
    ],
)
def test_a_wrong_value_is_reported_with_its_field_and_what_to_write(path, override, words):
    text = complaint(path, override)
    assert text.startswith(f"--set: {words}" if not words.startswith("protocols") else "--set: evaluation.datasets.0.")
    assert words in text
    assert not [word for word in JARGON if word in text.replace("YAML reads", "")]


def test_a_number_of_seeds_means_the_first_ones_and_a_list_stays_a_list(path):
    for text, seeds in (("3", (0, 1, 2)), ("1", (0,)), ("[3]", (3,)), ("[4, 2]", (4, 2))):
        assert load_config(path, [f"evaluation.seeds={text}"]).evaluation.seeds == seeds


def test_a_wrong_value_in_the_file_is_reported_with_the_files_name(tmp_path):
    content = document("/s", "/i") | {"seeds": 3}
    content["pretrain"]["epochs"] = "many"
    path = write_config(tmp_path / "run.yaml", content)
    assert complaint(path).splitlines() == [
        f"{path}: pretrain.epochs = 'many' is not a whole number",
        f"{path}: seeds is not a field; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "FILE: is empty: write a mapping of fields such as data, model, pretrain"),
        ("- a\n", "FILE: holds a list: write a mapping"),
        ("just words", "FILE: holds a str: write a mapping"),
        ("model: {}\ndata: {source: [}\n", "FILE:2: not YAML"),
        ("data:\n\tsource: x", "FILE:2: not YAML (found character '\\t'"),
        ("a: 1\n---\nb: 2\n", "FILE:2: not YAML (but found another document)"),
        ("model: {}\ndata: {source: x}\ndata: {source: y}\n", "FILE:3: not YAML (key 'data' is written twice)"),
        ("model: {}\ndata:\n  source: x\n  source: y\n", "FILE:4: not YAML (key 'source' is written twice)"),
        ("? [a]\n: 1\n", "FILE:1: not YAML (a key is not a name)"),
        ("data: !!python/object:os.system x", "FILE:1: not YAML (could not determine a constructor"),
        ("model: {}\ndata: {source: x}\n7: 1\n", "FILE: 7 is not a field; the fields here are name"),
        ("model: {}\n", "FILE: data is missing; add it, or --set data=..."),
        ("model: {}\ndata: {seed: 1}\n", "FILE: data.source is missing; add it, or --set data.source=..."),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_the_line(tmp_path, text, words):
    assert words in complaint_of(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert complaint(tmp_path / "absent.yaml").endswith(
        "absent.yaml: cannot be read (No such file or directory). Give the path of a YAML file"
    )
    assert "cannot be read (Is a directory)" in complaint(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read (it is not text)" in complaint(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.epochs", "--set pretrain.epochs: write field=value"),
        ("=3", "--set =3: write field=value"),
        ("a..b=3", "--set a..b=3: write field=value"),
        ("pretrain.epochs=[", "'[' is not a YAML value"),
        ("pretrain.epochs.x=3", "pretrain.epochs is 2 and has no x; set pretrain.epochs as a whole"),
        (
            "evaluation.datasets.1.name=x",
            "evaluation.datasets is [{'name': 'toy'}] and has no 1; set evaluation.datasets as a whole",
        ),
    ],
)
def test_a_malformed_override_is_refused(path, override, words):
    assert words in complaint(path, override)


# --- what is read ----------------------------------------------------------------------------------------------------------


def test_overrides_win_in_order_and_reach_into_lists(path):
    config = load_config(
        path, ["pretrain.epochs=3", "evaluation.datasets.0.name=b", "pretrain.epochs=4", "tracking.uri=http://x"]
    )
    assert config.pretrain.epochs == 4
    assert config.evaluation.datasets[0].name == "b"
    assert config.tracking.uri == "http://x"


def test_numbers_as_people_write_them(path):
    config = load_config(path, ["pretrain.base_lr=1e-3", "data.snapshot=2", "resources.workers=[2, 4]"])
    assert config.pretrain.base_lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert config.data.snapshot == "2"
    assert config.resources.workers == (2, 4)


def test_merged_keys_of_yaml_work(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {source: x}\nmodel: {}\npretrain: &short {epochs: 50}\nevaluation: {finetune: {<<: *short}}\n"
    )
    assert load_config(path).evaluation.finetune.epochs == 50


@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_size_is_replaced_by_its_encoder_and_given_fields_override_it(tmp_path, size):
    def model(**fields: Any) -> Any:
        content = {"data": {"source": "x"}, "model": {"size": size, **fields}}
        return load_config(write_config(tmp_path / "run.yaml", content)).model

    assert model().encoder == SIZES[size]()
    assert model(encoder={"depth": 2}).encoder == dataclasses.replace(SIZES[size](), depth=2)
    assert model(decoder_depth=3).decoder_depth == 3


def test_local_addresses_become_absolute_and_remote_ones_lose_the_last_slash(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(path, ["store=here", "data.source=s3://b/images/", "evaluation.datasets.0.source=~/x"])
    assert config.store == str(tmp_path / "here")
    assert config.data.source == "s3://b/images"
    assert config.evaluation.datasets[0].source == str(Path.home() / "x")


def test_variables_and_the_home_folder_in_addresses_are_expanded(path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        path,
        ["store=$SCRATCH/mae", "data.source=~/images", "data.labels=${SCRATCH}/l.csv", "tracking.uri=sqlite:///~/r.db"],
    )
    assert (config.store, config.data.source) == ("/scratch/me/mae", "/home/me/images")
    assert (config.data.labels, config.tracking.uri) == ("/scratch/me/l.csv", "sqlite:////home/me/r.db")
    monkeypatch.delenv("SCRATCH")
    for field in ("store", "data.source", "tracking.uri"):
        said = complaint(path, f"{field}=$SCRATCH/mae")
        assert said.startswith(f"--set: {field}")
        assert "SCRATCH, which is not set" in said


def test_relative_paths_of_a_file_start_at_its_folder_and_those_of_set_and_defaults_where_one_works(
    tmp_path, monkeypatch
):
    content = document("results", "../images")
    content["data"]["labels"] = "labels.csv"
    content["evaluation"]["datasets"] = [{"name": "toy", "source": "toy"}, {"name": "far", "source": "s3://b/far/"}]
    content["tracking"] = {"uri": "sqlite:///runs.db"}
    content["resources"]["cache_directory"] = "cache"
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    path = write_config(there / "run.yaml", content)
    monkeypatch.chdir(here)
    config = load_config(Path("../there/run.yaml"))
    assert config.store == str(there / "results")
    assert config.data.source == f"{there}/../images"
    assert config.data.labels == str(there / "labels.csv")
    assert [one.source for one in config.evaluation.datasets] == [str(there / "toy"), "s3://b/far"]
    assert config.tracking.uri == f"sqlite:///{there}/runs.db"
    assert config.resources.cache_directory == str(there / "cache")
    assert load_config(path) == config
    given = load_config(path, ["store=results", "evaluation.datasets.0.source=toy", "tracking.uri=sqlite:///runs.db"])
    assert given.store == str(here / "results")
    assert given.evaluation.datasets[0].source == str(here / "toy")
    assert given.tracking.uri == f"sqlite:///{here}/runs.db"
    copied = read_document(path, ["data.source=images"])  # `mae fork` writes it into another folder
    assert (copied["store"], copied["data"]["source"]) == (str(there / "results"), str(here / "images"))
    del content["store"]
    write_config(path, content)
    assert load_config(path).store == str(here / ".mae/store")


def test_a_path_that_exists_only_where_one_works_is_pointed_out(tmp_path, monkeypatch, caplog):
    (tmp_path / "images").mkdir()
    (tmp_path / "configs").mkdir()
    path = write_config(tmp_path / "configs/run.yaml", document("/store", "images"))
    monkeypatch.chdir(tmp_path)
    assert load_config(path).data.source == str(tmp_path / "configs/images")
    assert "data.source: images" in caplog.text
    assert f"For {tmp_path / 'images'} write its absolute path, or --set data.source=images" in caplog.text


def test_recipes_name_no_path():
    for recipe in (ROOT / "jobs/configs").glob("*.yaml"):
        content = yaml.safe_load(recipe.read_text())
        assert not {"store", "tracking"} & content.keys(), recipe
        assert not {"source", "labels"} & content["data"].keys(), recipe


def test_a_resolved_configuration_reads_as_itself(path, tmp_path):
    config = load_config(path, ["resources.workers=[1, 2]", "model.encoder.depth=2"])
    again = write_config(tmp_path / "again.yaml", yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert load_config(again).written_with(config.overridden) == config


@pytest.mark.parametrize("recipe", sorted((ROOT / "jobs/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(recipe):
    assert load_config(recipe, ["data.source=/data/images"]).data.source == "/data/images"


# --- a few epochs and square images need no second field -----------------------------------------------------------------------


def test_a_default_warmup_that_does_not_fit_becomes_its_share_of_the_epochs(tmp_path):
    content = {"data": {"source": "/i"}, "model": {}, "pretrain": {"epochs": 2}}
    content["evaluation"] = {"finetune": {"epochs": 5}, "linear": {"epochs": 9}}
    config = load_config(write_config(tmp_path / "run.yaml", content))
    assert config.pretrain.warmup_epochs == pytest.approx(2 * 40 / 800)
    assert config.evaluation.settings("finetune").warmup_epochs == pytest.approx(5 * 5 / 100)
    assert config.evaluation.settings("linear").warmup_epochs == pytest.approx(9 * 10 / 90)


def test_a_default_warmup_that_fits_and_one_that_is_written_stay(tmp_path):
    path = write_config(tmp_path / "run.yaml", {"data": {"source": "/i"}, "model": {}})
    assert load_config(path, ["pretrain.epochs=41"]).pretrain.warmup_epochs == 40
    assert load_config(path).evaluation.settings("linear").warmup_epochs == 10
    assert "pretrain.warmup_epochs = 40.0 is not in [0, epochs=2)" in complaint(
        path, "pretrain.epochs=2", "pretrain.warmup_epochs=40"
    )


def test_one_number_is_a_square_image_size(path):
    config = load_config(path, ["model.encoder.image_size=32"])
    assert config.model.encoder.image_size == (32, 32)
    assert config == load_config(path, ["model.encoder.image_size=[32, 32]"])


# --- what enters the fingerprints --------------------------------------------------------------------------------------------

OUTSIDE = (
    "name",
    "store",
    "resources.",
    "tracking.",
    "data.bad_share_warn",
    "data.bad_share_stop",
    "evaluation.milestone_images",
    "evaluation.milestone_probe_epochs",
)
RECIPES = ("pretrain", "evaluation.finetune", "evaluation.partial", "evaluation.scratch")
PROBES = ("evaluation.linear_online", "evaluation.attentive")
OTHER: dict[str, Any] = {
    # another valid value, for fields where the rule in `another` would give an invalid one
    "model.encoder.image_size.0": 32,
    "model.encoder.image_size.1": 32,
    "model.encoder.patch_size": 8,
    "model.encoder.embed_dim": 24,
    "model.encoder.num_heads": 1,
    "model.decoder_embed_dim": 24,
    "model.decoder_num_heads": 1,
    "model.mask_ratio": 0.5,
    "model.target": "raw",
    "resources.evaluation_workers": 2,
    "resources.parallel_steps": 2,
    "data.source": "/data/others",
    "evaluation.datasets.0.source": "/data/third",
    "evaluation.datasets.0.protocols": ["linear"],
    "evaluation.preset": "small-images",
    "evaluation.partial.blocks.0": 3,
    "evaluation.partial.blocks.1": 1.5,
    "evaluation.partial.blocks.2": 2.5,
    "evaluation.scratch.global_batch": 4098,
    "evaluation.scratch.layer_decay": 0.9,
    **{f"evaluation.{name}.precision": "fp32" for name in ("partial", "scratch")},
    **{f"evaluation.{name}.ema": 0.999 for name in ("finetune", "partial")},
    **{f"evaluation.{name}.warmup_epochs": 0.5 for name in ("finetune", "partial", "scratch")},
    **{f"{section}.augment.scale.1": 0.9 for section in (*RECIPES, *PROBES)},
    **{f"{section}.augment.rand_augment": "rand-m5-inc1" for section in (*RECIPES, *PROBES)},
    **{f"{section}.max_grad_norm": 1.0 for section in RECIPES},
    **{f"{section}.precision": "fp32" for section in PROBES},
    **{f"{section}.more_base_lrs": [0.2] for section in PROBES},
    "evaluation.attentive.kind": "full",
    "evaluation.attentive.num_heads": 2,
    "evaluation.attentive.num_queries": 8,
    "evaluation.attentive.tokens": "all",
    "evaluation.train_labels": 10,
    "tracking.uri": "http://127.0.0.1:5000",
    "tracking.usd_per_hour": 2.5,
    "resources.use_gpu": False,
    "resources.wall_clock_s": 3600.0,
    "resources.zero_stage": 2,
    "resources.profile_steps": [10, 2],
    "resources.keep_every_steps": 100,
    "weights": {"file": "/w.pth", "sha256": "0" * 64},
    "fork": {"checkpoint": "pretrain-0/g0001/checkpoints/step-00000004", "manifest_sha256": "0" * 64},
    "resources.offload": "optimizer",
    **{f"{section}.gradient_precision": "fp32" for section in RECIPES},
    "store": "/data/other",
}
FIXED = ("model.masking", "model.encoder.in_channels")
"""Fields that have only one valid value today."""
OF_WEIGHTS = ("pretrain.start", "pretrain.start_decoder")
"""Fields that need a file: tests/pipeline/runs/test_start_weights.py."""


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, value


def another(field: str, value: Any) -> Any:
    if field in OTHER:
        return OTHER[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.9 if value else 0.01
    choices = {
        "kind": "center",
        "split_from": "hash",
        "split": "val",
        "precision": "bf16",
        "pool": "mean",
        "schedule": "warmup_stable_decay",
        "positions": "learned",
        "encoder_input": "all",
        "loss_on": "all",
        "spikes": "skip",
        "checkpoint_copy": "disk",
        "decode_workers": 3,
        "compile": "off",
        "keep_best_by": "knn",
    }
    return choices.get(field.rpartition(".")[2], f"{value}2")


def changed(content: dict[str, Any], field: str, value: Any) -> RunConfig:
    content = copy.deepcopy(content)
    *parents, last = field.split(".")
    section: Any = content
    for parent in parents:
        section = section[int(parent)] if isinstance(section, list) else section[parent]
    section[int(last) if isinstance(section, list) else last] = value
    return RunConfig.model_validate(content)


def whole() -> dict[str, Any]:
    content = document("/data/store", "/data/images")
    config = RunConfig.model_validate({**content, "model": copy.deepcopy(MODEL)})
    full = canonical(config)
    full["evaluation"]["datasets"][0]["source"] = "/data/labelled"  # else how it is read is the pretraining source's
    for recipe in (full["pretrain"], *(full["evaluation"][name] for name in ("finetune", "partial", "scratch"))):
        recipe["augment"]["kind"] = "shift"
    return full


@pytest.mark.parametrize("field", [field for field, _ in leaves(whole()) if field not in OF_WEIGHTS])
def test_every_field_changes_a_fingerprint_unless_it_only_says_where_and_how(field):
    content = whole()
    value = dict(leaves(content))[field]
    if field in FIXED:
        with pytest.raises(ValueError, match=field.rpartition(".")[2]):
            changed(content, field, another(field, value))
        return
    before = {step.name: step.fingerprint for step in build(RunConfig.model_validate(content))}
    after = {step.name: step.fingerprint for step in build(changed(content, field, another(field, value)))}
    assert (before == after) == field.startswith(OUTSIDE), field


def test_reading_stays_small_enough_not_to_need_a_library():
    # docs/decisions/017-no-omegaconf.md
    files = [ROOT / "pipeline/config" / name for name in ("document.py", "reading.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 260


def test_every_section_is_walked():
    assert {field.partition(".")[0] for field, _ in leaves(whole())} == set(RunConfig.model_fields)
    assert isinstance(RunConfig.model_validate(whole()), BaseModel)


def test_another_mask_ratio_keeps_the_shards_and_the_random_encoders(path):
    def steps(*overrides: str) -> dict[str, str]:
        return {step.name: step.fingerprint for step in build(load_config(path, overrides))}

    before, after = steps(), steps("model.mask_ratio=0.5")
    assert {name for name in before if before[name] != after[name]} == {
        "pretrain",
        "linear-toy-pretrained-s0",
        "finetune-toy-pretrained-s0",
        "report",
    }


def test_visible_patches_enter_the_identity_only_where_older_versions_kept_one_more(path):
    """Toy images have 16 patches: half and three quarters divide them, and 0.7 leaves 4.8, which was 5 and is 4."""

    def trained(ratio: float) -> dict[str, Any]:
        (step,) = (one for one in build(load_config(path, [f"model.mask_ratio={ratio}"])) if one.kind == "pretrain")
        return step.identity()["config"]

    field = "visible_patches_rounded_down"
    assert [trained(ratio).get(field) for ratio in (0.5, 0.75, 0.8, 0.7)] == [None, None, None, 4]
    old = {key: value for key, value in trained(0.7).items() if key != field}
    assert nearest_difference({"config": trained(0.7)}, [{"config": old}]) == (f"config.{field}: absent -> 4",)


@pytest.mark.parametrize(("threads", "workers"), [(1, "auto"), (6, 6)])
def test_decode_threads_is_understood_and_its_new_name_said(path, caplog, threads, workers):
    config = load_config(path, [f"resources.decode_threads={threads}"])
    assert config.resources.decode_workers == workers
    assert "resources.decode_threads is now decode_workers" in caplog.text


@pytest.mark.parametrize(
    ("written", "read"), [("", "auto"), ("null", "auto"), ("auto", "auto"), ("true", True), ("no", False)]
)
def test_use_gpu_is_auto_true_or_false(path, written, read):
    assert load_config(path, [f"resources.use_gpu={written}"]).resources.use_gpu == read


def test_auto_decode_workers_are_the_cores_that_a_gpu_s_worker_has_left():
    """Ray reserves them; a worker without a GPU, or with two cores, decodes in a thread."""
    auto = Resources(use_gpu=True)
    assert auto.per_worker == {"CPU": 1.0, "GPU": 1.0}
    assert [auto.decided_for(cpus).decode_workers for cpus in (0, 1, 2, 4, 15.5, 200)] == [0, 0, 0, 3, 14, 32]
    assert auto.decided_for(16).per_worker == {"CPU": 16.0, "GPU": 1.0}
    assert Resources(decode_workers=3).decided_for(16).per_worker == {"CPU": 4.0}
