"""What training runs on: decided from what is asked for and what there is, and followed by everything else."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.cluster import device
from pipeline.cluster.device import choose_device
from pipeline.cluster.resources import Resources
from pipeline.errors import ConfigError
from pipeline.training import world
from pipeline.training.engine import deepspeed_engine
from pipeline.training.world import enter_world


@pytest.mark.parametrize(
    ("use_gpu", "workers", "gpus", "on_gpu", "text"),
    [
        ("auto", 1, 0, False, "training on the CPU: this cluster has no GPU"),
        ("auto", 1, 1, True, "training on 1 GPU"),
        ("auto", 4, 8, True, "training on 4 GPUs"),
        ("auto", (2, 8), 4, True, "training on 4 GPUs"),
        ("auto", 4, 1, False, "training on the CPU: this cluster has 1 GPU, fewer than resources.workers=4"),
        (None, 2, 2, True, "training on 2 GPUs"),
        (True, 2, 3, True, "training on 2 GPUs"),
        (False, 1, 8, False, "training on the CPU: resources.use_gpu is false"),
    ],
)
def test_what_is_decided_is_said(use_gpu, workers, gpus, on_gpu, text):
    choice = choose_device(Resources(use_gpu=use_gpu, workers=workers), gpus=gpus, where="this cluster").or_refuse()
    assert (choice.use_gpu, choice.text) == (on_gpu, text)


@pytest.mark.parametrize(
    ("workers", "gpus", "text"),
    [
        (
            1,
            0,
            "resources.use_gpu=true needs 1 GPU for resources.workers=1, but this machine has no GPU. Write resources.use_gpu: "
            "false to train on the CPU, or add GPUs",
        ),
        (
            (4, 8),
            2,
            "resources.use_gpu=true needs 4 GPUs for resources.workers=4, but this machine has 2 GPUs. Write resources.use_gpu: "
            "false to train on the CPU, write fewer workers, or add GPUs",
        ),
    ],
)
def test_gpus_that_are_asked_for_and_not_there_are_refused(workers, gpus, text):
    with pytest.raises(ConfigError) as refused:
        choose_device(Resources(use_gpu=True, workers=workers), gpus=gpus).or_refuse()
    assert str(refused.value) == text


def test_what_an_autoscaler_answered_is_part_of_the_reason():
    choice = choose_device(Resources(), gpus=0, where="this cluster", others="and its autoscaler starts none")
    assert choice.text == "training on the CPU: this cluster has no GPU, and its autoscaler starts none"


@pytest.mark.parametrize(("use_gpu", "backend", "kind"), [(False, "gloo", "cpu"), (True, "nccl", "cuda")])
def test_a_world_follows_from_the_decision_and_not_from_the_gpus_that_are_there(monkeypatch, use_gpu, backend, kind):
    made, current = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not use_gpu)  # the opposite
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(world.dist, "init_process_group", lambda backend, **_: made.append(backend))
    monkeypatch.setattr(world.dist, "get_backend", lambda: made[0])
    monkeypatch.setattr(world.dist, "new_group", lambda **options: options["backend"])
    monkeypatch.setattr(world.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(world.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(world.atexit, "register", lambda _: None)
    for name in world.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    entered = enter_world(use_gpu=use_gpu)
    assert (made, entered.device.type) == ([backend], kind)
    assert [one.type for one in current] == ["cuda"] * use_gpu


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_deepspeed_is_told_its_accelerator(monkeypatch, kind):
    monkeypatch.setenv("DS_ACCELERATOR", "other")  # of a shell, for something else
    monkeypatch.setenv("LOCAL_RANK", "0")
    deepspeed_engine._deepspeed(torch.device(kind))
    assert os.environ["DS_ACCELERATOR"] == kind


ON_THE_CPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
from pipeline.training.engine.deepspeed_engine import _deepspeed
from pipeline.training.world import enter_world
world = enter_world(use_gpu=False)
_deepspeed(world.device)
from deepspeed.accelerator import get_accelerator
print(world.device, torch.distributed.get_backend(), get_accelerator()._name)
"""


def test_a_worker_on_the_cpu_of_a_gpu_machine_leaves_the_gpu_alone():
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["cpu gloo cpu"], done.stderr


def test_a_gpu_counts_only_where_torch_can_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.local_gpu_count() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.local_gpu_count() == 2
