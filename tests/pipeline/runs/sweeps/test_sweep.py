"""Sweeps in this process: what members share, what they record, what a failure or a stop leaves, and what is refused."""

import json
import shutil
import signal
from pathlib import Path

import mlflow
import pytest
from run_kit import ROOT, Silent, document, migrated_database, states, store, write_config, write_images

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.planning.forecast import Assumptions
from pipeline.reporting.summaries import Score
from pipeline.runs.run import run_members, run_pipeline
from pipeline.runs.stopping import StopSignals
from pipeline.runs.sweeps.results import SweepSummary, sweep_verdict_line, write_page
from pipeline.runs.sweeps.sweep import Sweep, SweepOptions, load_sweep
from pipeline.runs.sweeps.sweep_plan import plan_sweep
from pipeline.storage import open_store

__all__ = ["migrated_database", "store"]
RATIOS = ["model.mask_ratio=0.5,0.75"]


@pytest.fixture(autouse=True)
def no_tracking_from_outside(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def written(folder: Path, store: Path, **sections) -> Path:
    content = document(store, write_images(folder / "images", 40))
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
    return write_config(folder / "run.yaml", {**content, **sections})


def go(sweep: Sweep, display=None, signals=None) -> SweepSummary:
    members = [one.run for one in sweep.members]
    runs = run_members(members, executor="in_process", display=display or Silent(), signals=signals)
    return SweepSummary(sweep=sweep, runs=runs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, migrated_database):
    """(configuration's file, sweep, summary, what was shown) of a sweep over two mask ratios."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "store").mkdir()
    shutil.copy(migrated_database, folder / "store" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        path = written(folder, folder / "store")
        sweep = load_sweep(path, SweepOptions(grid=RATIOS))
        display = Silent()
        return path, sweep, go(sweep, display), display.said


def test_equal_steps_run_once_and_each_member_has_all_of_its_own(finished):
    _, sweep, summary, said = finished
    assert sweep.name == "mask_ratio"
    began = [title for title, state, _ in said if state == "running"]
    assert sorted(began) == [
        "linear-toy-pretrained-s0 [mask_ratio=0.5]",
        "linear-toy-pretrained-s0 [mask_ratio=0.75]",
        "linear-toy-random-s0",
        "pretrain [mask_ratio=0.5]",
        "pretrain [mask_ratio=0.75]",
        "report [mask_ratio=0.5]",
        "report [mask_ratio=0.75]",
        "shard",
        "snapshot",
    ]
    assert [title for title, state, _ in said if state in ("done", "cached")].count("shard") == 1
    first, second = (states(run) for run in summary.runs)
    assert set(first.values()) == {"done"}
    assert first == second
    assert summary.exit_code == 0
    assert [score.encoder for score in summary.runs[1].scores] == ["pretrained", "random"]


def test_a_member_is_cached_for_mae_run_and_its_fingerprints_are_those_of_a_run(finished):
    path, sweep, summary, _ = finished
    run = run_pipeline(load_config(path, ["model.mask_ratio=0.5"]), executor="in_process", display=Silent())
    assert set(states(run).values()) == {"cached"}
    assert [o.step.fingerprint for o in run.outcomes] == [o.step.fingerprint for o in summary.runs[0].outcomes]
    assert run.scores == summary.runs[0].scores
    assert sweep.members[0].config.model.mask_ratio == 0.5


def test_the_same_sweep_again_does_nothing(finished):
    path, *_ = finished
    again = go(load_sweep(path, SweepOptions(grid=RATIOS)))
    assert {state for run in again.runs for state in states(run).values()} == {"cached"}


def test_each_member_is_a_run_of_its_own_in_mlflow_with_all_of_its_steps(finished):
    path, _, summary, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{path.parent / 'store' / 'mlflow.db'}")
    parents = [client.get_run(run.run_id) for run in summary.runs]
    assert [run.data.params["model.mask_ratio"] for run in parents] == ["0.5", "0.75"]
    assert [run.data.tags["mae.sweep"] for run in parents] == ["mask_ratio"] * 2
    assert [run.info.status for run in parents] == ["FINISHED"] * 2
    steps = [
        {key.removeprefix("mae.step."): id_ for key, id_ in run.data.tags.items() if key.startswith("mae.step.")}
        for run in parents
    ]
    assert steps[0].keys() == steps[1].keys() == set(states(summary.runs[0]))
    shared = {name for name in steps[0] if steps[0][name] == steps[1][name]}
    assert shared == {"snapshot", "shard", "linear-toy-random-s0"}
    assert all("score/linear/toy/pretrained" in run.data.metrics for run in parents)


def test_the_page_and_the_json_say_what_came_out(finished, tmp_path):
    _, sweep, summary, _ = finished
    target = open_store(str(tmp_path / "store"))
    addresses = write_page(summary, target, command="mae sweep run.yaml --set tracking.uri=http://me:secret@host")
    page = Path(addresses["sweep"]).read_text()
    assert addresses["sweep"] == f"{tmp_path}/store/sweeps/mask_ratio/index.html"
    for member, run in zip(sweep.members, summary.runs, strict=True):
        assert f">{member.point['model.mask_ratio']}</td>" in page
        assert next(score.text for score in run.scores if score.encoder == "pretrained") in page
    assert "mae sweep run.yaml" in page
    assert "secret" not in page
    assert 'src="http' not in page
    found = json.loads(target.read("sweeps/mask_ratio/sweep.json"))
    assert found["verdict"] == "done"
    assert [one["overrides"] for one in found["members"]] == [{"model.mask_ratio": 0.5}, {"model.mask_ratio": 0.75}]
    assert found["members"][1]["scores"]["toy"]["linear"]["pretrained"]["n"] == 1
    assert found["members"][1]["run"] == summary.runs[1].run_id


def test_the_plan_counts_what_is_shared_once(finished, tmp_path):
    path, *_ = finished
    sweep = load_sweep(path, SweepOptions(grid=["model.mask_ratio=0.5,0.6"], overrides=["pretrain.epochs=3"]))
    planned = plan_sweep(sweep, Assumptions())
    waiting = [[state for _, state in one.states].count("to_run") for one in planned.members]
    assert waiting == [3, 3]  # pretrain, linear, report
    assert planned.seconds == pytest.approx(sum(one.seconds for one in planned.members))
    new = load_sweep(path, SweepOptions(grid=["evaluation.linear.epochs=3,4"], overrides=["pretrain.epochs=3"]))
    shared = plan_sweep(new, Assumptions(images=100))
    assert shared.seconds < sum(one.seconds for one in shared.members)  # one pretraining serves both
    assert not list(tmp_path.iterdir())


# --- failures and stops


def test_a_failed_member_stops_no_other_and_the_table_says_why(tmp_path, store):
    path = written(tmp_path, store)
    # 1e30: the first step makes the weights infinite, and the guard gives up
    sweep = load_sweep(path, SweepOptions(grid=["pretrain.base_lr=1.0e+30,1.0e-3"]))
    summary = go(sweep)
    failed, fine = (states(run) for run in summary.runs)
    assert failed["pretrain"] == "failed"
    assert failed["report"] == "blocked"
    assert failed["linear-toy-random-s0"] == "done"
    assert set(fine.values()) == {"done"}
    assert (summary.verdict, summary.exit_code) == ("failed", 1)
    assert [row.state for row in summary.table.rows] == ["failed", "run"]
    assert summary.table.rows[0].remark.startswith("pretrain: ")
    assert "1 of 2 members; the others went on" in sweep_verdict_line(summary)
    client = mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    assert [client.get_run(run.run_id).info.status for run in summary.runs] == ["FAILED", "FINISHED"]


def test_a_stopped_sweep_goes_on_with_the_same_command(tmp_path, store):
    path = written(tmp_path, store)

    class StopsAtTheSecond(Silent):
        def step_state(self, step_name, state, *, detail=""):
            super().step_state(step_name, state, detail=detail)
            if step_name == "linear-toy-pretrained-s0 [mask_ratio=0.75]" and state == "running":
                signal.raise_signal(signal.SIGINT)

    with StopSignals() as signals:
        stopped = go(load_sweep(path, SweepOptions(grid=RATIOS)), StopsAtTheSecond(), signals)
    assert (stopped.verdict, stopped.exit_code) == ("stopped", 3)
    assert set(states(stopped.runs[0]).values()) == {"done"}
    assert states(stopped.runs[1])["pretrain"] == "done"
    assert states(stopped.runs[1])["linear-toy-pretrained-s0"] == "stopped"
    assert [row.state for row in stopped.table.rows] == ["run", "configured only"]
    assert "the same command goes on" in sweep_verdict_line(stopped)
    after = go(load_sweep(path, SweepOptions(grid=RATIOS)))
    assert after.verdict == "done"
    assert set(states(after.runs[0]).values()) == {"cached"}
    assert states(after.runs[1])["pretrain"] == "cached"
    assert states(after.runs[1])["linear-toy-pretrained-s0"] == "done"


# --- what is refused before anything starts


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("model.mask_ration=0.4,0.5", "--grid: model.mask_ration is not a field; did you mean mask_ratio"),
        ("pretrain.epochs=2,three", "member epochs=three: --grid: pretrain.epochs = 'three' is not a whole number"),
        ("pretrain.epochs=", "the grid of pretrain.epochs is empty"),
        ("model.mask_ratio=0.5,0.5", "two members are called 'mask_ratio=0.5'"),
        ("resources.micro_batch=4,8", "are the same run: resources.micro_batch changes no result"),
        ("store=a,b", "store is shared by all members of a sweep"),
        ("tracking.experiment=a,b", "tracking.experiment is shared"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, grid, words):
    path = written(tmp_path, tmp_path / "store")
    with pytest.raises(ConfigError, match=words):
        load_sweep(path, SweepOptions(grid=[grid]))
    assert not (tmp_path / "store").exists()


def test_equal_values_in_two_writings_are_one_run(tmp_path):
    path = written(tmp_path, tmp_path / "store")
    with pytest.raises(ConfigError, match=r"members base_lr=0.001 and base_lr=1e-3 are the same run"):
        load_sweep(path, SweepOptions(grid=["pretrain.base_lr=0.001,1e-3"]))


def test_options_that_do_not_go_together_are_refused(tmp_path):
    path = written(tmp_path, tmp_path / "store")
    with pytest.raises(ConfigError, match="leave --config out"):
        load_sweep(path, SweepOptions(grid=RATIOS, config=path))
    members = ROOT / "jobs/configs/ablations/target.yaml"
    with pytest.raises(ConfigError, match="lists its members"):
        load_sweep(members, SweepOptions(grid=RATIOS, config=path))
    with pytest.raises(ConfigError, match="'a b' is not usable"):
        load_sweep(path, SweepOptions(grid=RATIOS, name="a b"))


# --- the table


def test_published_rows_stand_beside_their_members_in_the_order_of_the_paper(tmp_path, finished):
    path, _, summary, _ = finished
    file = ROOT / "jobs/configs/ablations/mask_ratio.yaml"
    sweep = load_sweep(file, SweepOptions(config=path, grid=["model.mask_ratio=0.75,0.5"]))
    table = SweepSummary(sweep=sweep, runs=list(reversed(summary.runs))).table
    assert [row.label for row in table.rows][:2] == ["mask_ratio=0.1", "mask_ratio=0.2"]
    assert [row.label for row in table.rows if row.state == "run"] == ["mask_ratio=0.5", "mask_ratio=0.75"]
    assert [row.paper["linear"] for row in table.rows if row.state == "run"] == [69.9, 73.5]
    assert table.published(("toy", "linear")) == "linear"
    assert table.published_alone == ["finetune"]
    assert isinstance(table.random["toy", "linear"], Score)
