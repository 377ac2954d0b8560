"""The `mae` command in processes of its own: help, wrong input, JSON, signals."""

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_kit import (
    ROOT,
    document,
    end_with_parent,
    environment,
    mae,
    migrated_database,
    store,
    write_config,
    write_images,
)

from jobs.first_line import PROTOCOLS, first_line
from pipeline.config.fields import DatasetConfig, RunConfig
from pipeline.runs.stopping import ECHO_S

__all__ = ["migrated_database", "store"]


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return standard error, which must be a single line that begins with `mae: `, after the line that names the run."""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    if lines and re.fullmatch(r"run \S+  model \S+  store .+  steps .+", lines[0]):
        lines = lines[1:]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mae: ")
    return lines[0].removeprefix("mae: ")


@pytest.fixture
def config(tmp_path, store) -> Path:
    return write_config(tmp_path / "run.yaml", document(store, write_images(tmp_path / "images", 40)))


# --- help ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["compare", "--help"],
        ["plan", "--help"],
        ["sweep", "--help"],
        ["job", "submit", "--help"],
        ["shards", "verify", "--help"],
        ["doctor", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from jobs.cli import app
try:
    app({arguments!r})
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "ray", "mlflow", "deepspeed", "pyarrow", "boto3", "numpy"}} & set(sys.modules)
print("HEAVY", sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert "HEAVY []" in done.stdout
    assert "Usage" in done.stdout


def test_every_command_says_what_it_does():
    text = mae("--help").stdout + mae("job", "--help").stdout
    for command in ("run", "sweep", "plan", "compare", "ui", "job", "submit", "status", "logs", "stop", "list"):
        assert re.search(rf"\b{command}\s+\w+", text), command


def test_an_unknown_command_or_option_is_exit_code_2():
    for arguments in (["runn"], ["run"], ["run", "x.yaml", "--zzz"]):
        done = mae(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


# --- wrong input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_configuration_is_one_line_and_exit_code_2(tmp_path, command):
    path = tmp_path / "run.yaml"
    path.write_text("data: {source: x}\nmodel: {size: tiny\n")
    done = mae(command, path)
    assert (done.returncode, done.stdout) == (2, "")
    assert only_line(done).startswith(f"{path}:3: not YAML")
    write_config(path, document(tmp_path / "store", tmp_path) | {"sede": 1})
    done = mae(command, path)
    assert (done.returncode, only_line(done)) == (2, f"{path}: sede is not a field; did you mean seed?")
    assert not (tmp_path / "store").exists()


def test_a_missing_and_an_empty_source_are_one_line_and_exit_code_2_and_images_are_enough_to_go_on(tmp_path, store):
    content = document(store, tmp_path / "images")
    content["evaluation"]["datasets"] = []
    path = write_config(tmp_path / "run.yaml", content)
    done = mae("run", path, "--in-process", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "images does not exist. Point it at a folder" in only_line(done)
    (tmp_path / "images").mkdir()
    done = mae("run", path, "--in-process", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds no images (0 other files)" in only_line(done)
    write_images(tmp_path / "images", 40)
    done = mae("run", path, "--in-process", "--json")
    assert done.returncode == 0, done.stderr
    assert {step["state"] for step in json.loads(done.stdout)["steps"]} == {"done"}


def test_a_store_that_cannot_be_written_is_one_line(tmp_path, store):
    (tmp_path / "file").write_text("x")
    path = write_config(
        tmp_path / "run.yaml", document(tmp_path / "file" / "store", write_images(tmp_path / "images", 20))
    )
    done = mae("run", path, "--in-process")
    assert done.returncode == 2
    assert f"{tmp_path}/file/store" in only_line(done)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({made.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.system
def test_a_full_disk_stops_the_run_in_one_line_and_space_lets_it_go_on(tmp_path, migrated_database):
    with small_disk(tmp_path / "disk", "100k") as disk:
        content = document(disk / "store", write_images(tmp_path / "images", 200))
        content["evaluation"]["datasets"] = []
        path = write_config(tmp_path / "run.yaml", content | {"tracking": {"uri": f"sqlite:///{migrated_database}"}})
        done = mae("run", path, "--in-process", "--json")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        failures = [line for line in done.stderr.splitlines() if line.startswith("shard: failed")]
        assert len(failures) == 1
        assert "no space left" in failures[0]
        assert "Free some space, or choose another store; finished work is kept" in failures[0]
        states = {step["name"]: step["state"] for step in json.loads(done.stdout)["steps"]}
        assert (states["shard"], states["pretrain"]) == ("failed", "blocked")
        assert not list(disk.rglob(".tmp-*"))  # no file is half written
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        done = mae("run", path, "--in-process", "--json")
        assert done.returncode == 0, done.stderr


# --- the first line ------------------------------------------------------------------------------------------------------------


def test_run_says_at_once_what_it_is_about_to_do(config):
    """Before anything heavy is imported: on a busy machine torch alone takes ten seconds."""
    code = f"""
import sys
from pathlib import Path
from jobs.first_line import first_line
import jobs.cli
print(first_line(Path({str(config)!r}), ["name=other", "evaluation.datasets.0.protocols=[linear]"]))
print("HEAVY", sorted({{"torch", "ray", "mlflow", "numpy", "pydantic", "rich.console"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    line, heavy = done.stdout.splitlines()
    store = yaml.safe_load(config.read_text())["store"]
    told = "snapshot (lists the source), shard (packs the images), pretrain, linear (probes the frozen encoder), report"
    assert line == f"run other  model tiny  store {store}  steps {told}"
    assert heavy == "HEAVY []"


def test_the_first_line_keeps_silent_about_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    assert first_line(path) is None
    for text in ("", "- a", "model: {size: tiny", "data: {}", "model: 3", "model: {}\nevaluation: {datasets: [7]}"):
        path.write_text(text)
        assert first_line(path) is None
    path.write_text("model: {}")
    assert (
        first_line(path)
        == "run mae  model base  store .mae/store  steps snapshot (lists the source), shard (packs the images), pretrain, "
        "linear (probes the frozen encoder), finetune (trains it on the labels), report"
    )
    assert first_line(path, ["data.source"]) is not None
    assert first_line(path, ["name=x", "model=3"]) is None


def test_the_first_line_knows_the_defaults():
    assert DatasetConfig.model_fields["protocols"].default == PROTOCOLS
    assert (RunConfig.model_fields["name"].default, RunConfig.model_fields["store"].default) == ("mae", ".mae/store")


# --- JSON ------------------------------------------------------------------------------------------------------------------------


def test_plan_json_has_its_contract_and_writes_nothing(tmp_path):
    path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", write_images(tmp_path / "images", 20)))
    done = mae("plan", path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    steps = json.loads(line)["steps"]
    assert [step["name"] for step in steps][:3] == ["snapshot", "shard", "pretrain"]
    for step in steps:
        assert {"name", "fingerprint", "state", "differs", "memory_gib", "seconds", "cost"} <= step.keys()
        assert (step["state"], step["differs"], len(step["fingerprint"])) == ("to_run", [], 64)
    assert not (tmp_path / "store").exists()
    done = mae("plan", path, "--json", "--set", "data.source=/nowhere")
    assert {step["state"] for step in json.loads(done.stdout)["steps"]} == {"blocked"}
    assert "WARNING snapshot is blocked: data.source='/nowhere'" in done.stderr


def test_run_json_and_then_plan_says_what_a_changed_field_costs(config):
    done = mae("run", config, "--in-process", "--json", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # nothing else on standard output
    answer = json.loads(line)
    assert {step["state"] for step in answer["steps"]} == {"done"}
    assert answer["scores"]["toy"].keys() == {"linear", "finetune"}
    addresses = [line for line in done.stderr.splitlines() if line.startswith("report  ")]
    assert any(line.endswith(answer["addresses"]["report"]) for line in addresses)  # whole, on one line

    done = mae("plan", config, "--json", "--set", "model.mask_ratio=0.5")
    rows = {row["name"]: row for row in json.loads(done.stdout)["steps"]}
    assert rows["shard"]["state"] == "cached"
    assert rows["pretrain"]["differs"] == ["config.model.mask_ratio: 0.75 -> 0.5"]
    assert rows["pretrain"]["memory_gib"] > 0
    assert rows["pretrain"]["seconds"] > 0  # its images were counted
    assert json.loads(done.stdout)["proposed"] == "--set resources.micro_batch=8 --set resources.zero_stage=1"
    assert rows["shard"]["memory_gib"] is None
    prices = config.with_name("prices.yaml")
    prices.write_text("H100: 1000000")
    shown = mae(
        *("plan", config, "--set", "model.mask_ratio=0.5", "--hardware", "h100", "--prices", prices), COLUMNS="80"
    ).stdout
    assert "pretrain on 1 x H100, 74.5 GiB each, 30% to 50% of 67 TFLOP/s in fp32 (NVIDIA H100" in shown
    assert "ZeRO-1 set" in shown
    assert "proposed: --set resources.micro_batch=8 --set resources.zero_stage=1" in shown
    assert "$" in shown
    assert "config.model.mask_ratio: 0.75 -> 0.5" in shown
    assert rows["pretrain"]["fingerprint"][:12] in mae("plan", config, "--set", "model.mask_ratio=0.5").stdout

    done = mae("run", config, "--in-process", "--json")
    assert {step["state"] for step in json.loads(done.stdout)["steps"]} == {"cached"}


# --- signals -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run `mae` in a process group of its own, and kill it afterwards if it still runs."""
    call = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    process = subprocess.Popen(
        call,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_file(root: Path, pattern: str, process: subprocess.Popen[str], *, within_s: float = 180) -> Path:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := sorted(root.glob(pattern)):
            return found[-1]
        assert process.poll() is None, "the run ended before it was stopped"
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in {root} within {within_s} s")


def lengthened(config: Path, epochs: int) -> Path:
    content: dict[str, Any] = yaml.safe_load(config.read_text())
    content["pretrain"]["epochs"] = epochs
    content["resources"] |= {"checkpoint_every_steps": 10, "log_every_steps": 10}
    content["evaluation"]["datasets"] = []
    return write_config(config, content)


def states(stdout: str) -> dict[str, str]:
    return {step["name"]: step["state"] for step in json.loads(stdout)["steps"]}


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(config, store):
    lengthened(config, 400)  # two seconds or more of steps after each stop, on a quick machine
    for attempt, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), start=1):
        with running("run", config, "--in-process", "--json") as process:
            wait_for_file(store, f"pretrain-*/g{attempt:04d}/checkpoints/*/manifest.json", process)
            process.send_signal(number)
            os.killpg(process.pid, number)  # the echo that `timeout` and shells send
            stdout, _ = process.communicate(timeout=180)
        assert process.returncode == 3, number
        came = "done" if attempt == 1 else "cached"
        assert states(stdout) == {"snapshot": came, "shard": came, "pretrain": "stopped", "report": "stopped"}
        assert not list(store.glob("pretrain-*/receipt.json"))

    done = mae("run", config, "--in-process", "--json")
    assert done.returncode == 0, done.stderr
    assert states(done.stdout) == {"snapshot": "cached", "shard": "cached", "pretrain": "done", "report": "done"}
    continues = [json.loads(claim.read_text())["continues"] for claim in sorted(store.glob("pretrain-*/gen/*.json"))]
    assert [key[:6] for key in continues] == ["", "g0001/", "g0002/", "g0003/"]


@pytest.mark.system
def test_a_second_signal_cuts_off_at_once_with_exit_code_3(config, store):
    lengthened(config, 3000)
    with running("run", config, "--in-process", "--json") as process:
        wait_for_file(store, "pretrain-*/g0001/checkpoints/*/manifest.json", process)
        process.send_signal(signal.SIGINT)
        time.sleep(ECHO_S + 0.05)  # sooner, it is an echo of the first
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 3


# --- wrong addresses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "environment", "words"),
    [
        (["store={tmp_path}/a file/store"], {}, "no store can be kept there"),
        (["store=s3://no-such-bucket"], {"AWS_DEFAULT_REGION": "us_east"}, "AWS_DEFAULT_REGION='us_east'"),
        (["tracking.uri=localhost:5000"], {}, "localhost:5000"),
        (["tracking.uri=sqlite:///{tmp_path}/a file"], {}, "not a readable SQLite file"),
    ],
)
def test_a_wrong_address_is_wrong_input(config, tmp_path, overrides, environment, words):
    (tmp_path / "a file").write_text("not a database " * 100)
    sets = [part for override in overrides for part in ("--set", override.format(tmp_path=tmp_path))]
    done = mae("run", config, "--in-process", *sets, **environment)
    assert done.returncode == 2
    assert words in only_line(done)


def test_a_bucket_that_does_not_exist_is_wrong_input(config, s3_endpoint):
    done = mae("run", config, "--in-process", "--set", "store=s3://no-such-bucket-anywhere/x")
    assert done.returncode == 2
    assert "no such bucket" in only_line(done)


def test_in_process_is_one_worker_whatever_a_launcher_left_in_the_environment(config):
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    done = mae("run", config, "--in-process", "--set", "evaluation.datasets=[]", **launcher)
    assert done.returncode == 0, done.stderr
    assert "ignored (RANK=0, WORLD_SIZE=4, MASTER_ADDR=127.0.0.1, MASTER_PORT=29519, LOCAL_RANK=0)" in " ".join(
        done.stderr.split()
    )


@pytest.mark.system
@pytest.mark.parametrize("where", [["--in-process"], []])
def test_a_terminal_that_is_closed_ends_the_run_with_a_save(config, store, where):
    lengthened(config, 3000)
    ours, theirs = os.openpty()

    def take_the_terminal() -> None:
        end_with_parent()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(config), *where],
        cwd=ROOT,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        text=True,
        start_new_session=True,
        preexec_fn=take_the_terminal,  # noqa: PLW1509 - three system calls
    )
    os.close(theirs)
    closing = threading.Event()
    reader = threading.Thread(target=read_until, args=(closing, ours), daemon=True)
    reader.start()
    try:
        wait_for_file(store, "pretrain-*/g0001/checkpoints/*/manifest.json", process)
        closing.set()
        reader.join()
        os.close(ours)  # the kernel sends SIGHUP
        assert process.wait(60) == 3
    finally:
        if process.poll() is None:
            process.kill()
    assert list(store.glob("pretrain-*/stop/0001.json"))


def read_until(closing: threading.Event, terminal: int) -> None:
    """Take in what a terminal shows, so that its writer does not block."""
    while not closing.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):
                os.read(terminal, 4096)
