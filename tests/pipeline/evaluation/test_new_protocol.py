"""A new evaluation protocol is one new file, and one word in the Literal of protocol names."""

import json
import os
import shutil
import subprocess
import sys

from run_kit import ROOT, document, environment, write_config, write_images

NEAREST_MEAN = '''
"""Nearest class mean: an image gets the class whose mean feature is nearest to its own."""

from dataclasses import dataclass

import torch

from pipeline.evaluation.features import Pool, extract_splits
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import StageResult

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    pool: Pool = "cls"


@dataclass(frozen=True, kw_only=True)
class Config(ProtocolConfig):
    settings: Settings


def evaluate(config, inputs, attempt):
    if result := skipped(inputs["shards"]):
        return result
    train, test = extract_splits(config, inputs, attempt, pool=config.settings.pool)
    means = torch.stack([train.values[train.labels == label].mean(dim=0) for label in (0, 1)])
    right = torch.cdist(test.values, means).argmin(dim=1) == test.labels
    return StageResult(ScoreFacts(top1=right.double().mean().item(), images=len(right)).as_json())


PROTOCOL = EvaluationProtocol(
    settings=Settings,
    step_config=lambda common, settings: Config(**vars(common), settings=settings),
    evaluate=evaluate,
)
'''
DRIVER = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.graph.runner import GraphRun
from pipeline.runs.workflow import build
from pipeline.storage import open_store

path = Path(sys.argv[1])
settings = ["evaluation.datasets=[{name: toy, protocols: [nearest_mean]}]", "evaluation.nearest_mean.pool=mean"]
try:
    load_config(path, ["evaluation.nearest_mean.pol=mean"])
except ConfigError as error:
    refused = str(error)
plan = CliRunner().invoke(app, ["plan", str(path), "--json", *(word for text in settings for word in ("--set", text))])
config = load_config(path, settings)
step = next(step for step in build(config) if step.name == "nearest_mean-toy-random-s0")
hooks = SimpleNamespace(tracking_uri="", begin=lambda step: "", progress=lambda *word: None, end=lambda outcome: None)
outcomes = GraphRun([step], store=open_store(config.store), executor="in_process", hooks=hooks).walk()
print(json.dumps({
    "code": sys.modules["pipeline"].__file__,
    "refused": refused,
    "planned": [row["name"] for row in json.loads(plan.stdout)["steps"]],
    "config": step.identity()["config"]["settings"],
    "states": {outcome.step.name: outcome.state for outcome in outcomes},
    "facts": outcomes[-1].receipt.facts,
}))
"""


def test_a_new_protocol_is_one_file_and_one_word(tmp_path):
    copy = tmp_path / "code" / "pipeline"
    shutil.copytree(ROOT / "pipeline", copy, ignore=shutil.ignore_patterns("__pycache__"))
    names = copy / "evaluation" / "protocols" / "__init__.py"
    assert names.read_text().count("ProtocolName = Literal[") == 1
    names.write_text(names.read_text().replace("Literal[", 'Literal["nearest_mean", ', 1))
    (names.parent / "nearest_mean.py").write_text(NEAREST_MEAN)

    path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", write_images(tmp_path / "images", 30)))
    places = os.pathsep.join(map(str, (copy.parent, ROOT)))
    call = [sys.executable, "-c", DRIVER, str(path)]
    done = subprocess.run(
        call, cwd=tmp_path, env=environment(PYTHONPATH=places), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["code"].startswith(str(copy))
    assert said["refused"] == "--set: evaluation.nearest_mean.pol is not a field; did you mean pool?"
    assert said["planned"][3:] == ["nearest_mean-toy-pretrained-s0", "nearest_mean-toy-random-s0", "report"]
    assert said["config"] == {"pool": "mean"}
    assert said["states"] == dict.fromkeys(("snapshot", "shard", "nearest_mean-toy-random-s0"), "done")
    assert 0 <= said["facts"]["top1"] <= 1
    assert said["facts"]["images"] > 0
