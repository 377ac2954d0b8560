"""The reference of the configuration names every field that a file may hold, and explains each of them."""

from typing import Any

from pydantic import BaseModel
from run_kit import document, write_config

from pipeline.config import load_config
from pipeline.config.reference import field_references

FIELDS = {one.name: one for one in field_references()}


def test_every_field_has_a_type_and_a_meaning():
    assert [one.name for one in FIELDS.values() if not one.meaning or not one.type] == []
    assert not [one.name for one in FIELDS.values() if "\n" in one.meaning]


WEIGHTS = {"weights.file", "weights.sha256", "weights.prefix", "weights.assumed"}


def test_the_fields_are_those_of_a_configuration(tmp_path):
    config = load_config(write_config(tmp_path / "run.yaml", document("/s", "/i")))

    def names(value: Any, prefix: str = "") -> set[str]:
        if isinstance(value, dict):
            return {prefix} | {n for key, one in value.items() for n in names(one, f"{prefix}.{key}")}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {prefix} | names(value[0], f"{prefix}.*")
        return {prefix}

    assert isinstance(config, BaseModel)
    found = {name.removeprefix(".") for name in names(config.model_dump(mode="json"))} - {"", "evaluation.datasets.*"}
    assert FIELDS.keys() - found == {"model.size", "fork.checkpoint", "fork.manifest_sha256", *WEIGHTS}
    assert found <= FIELDS.keys()


def test_defaults_and_types_read_as_a_user_writes_them():
    shown = {name: (FIELDS[name].type, FIELDS[name].default) for name in FIELDS}
    assert shown["data.source"] == ("text", "required")
    assert shown["data.snapshot"] == ("text or list of text", '"1"')
    assert shown["model.size"] == ("tiny | small | base | large | huge", "base")
    assert shown["model.encoder.embed_dim"] == ("whole number", "from model.size")
    assert shown["model.encoder.image_size"] == ("[whole number, whole number]", "[224, 224]")
    assert shown["pretrain.base_lr"] == ("number", "0.00015")
    assert shown["pretrain.precision"] == ("bf16 | fp32 | tf32", "bf16")
    assert shown["evaluation.finetune.epochs"] == ("whole number", "100")  # a subclass's default
    assert shown["evaluation.datasets"] == ("list of section", "[{name: data}]")
    assert shown["resources.use_gpu"] == ("auto or true or false", "auto")
    assert shown["fork"] == ("section or null", "null")
    assert FIELDS["evaluation.finetune.betas"].meaning == FIELDS["pretrain.betas"].meaning  # inherited
