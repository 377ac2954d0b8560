"""The runner on tiny real steps: twice, changed, planned only, failing, stopped, killed; in this process and on a real Ray."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest
from graph_drivers import HERE, Driver, Silent, check_like_undisturbed, kill_and_go_on, results, walk_to_the_end
from graph_stages import OUT, Work, count, dies_once, fails, meets, newest_link, small_graph, write

from pipeline import cluster
from pipeline.cluster.resources import Resources
from pipeline.errors import DataError, Fenced, PipelineError, Stopped, StorageError
from pipeline.graph.plan import dotted_fields, nearest_difference, plan_graph
from pipeline.graph.receipts import RECEIPT, claim, claims, read_receipt
from pipeline.graph.runner import GraphRun, execute_step, stop_request_key
from pipeline.graph.step import Attempt, Step
from pipeline.storage import FileStore


@pytest.fixture
def store(tmp_path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.fixture
def options(tmp_path) -> dict[str, object]:
    return {"log": str(tmp_path / "log")}


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", HERE)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # `connect` sets them; this restores them afterwards
            patch.setenv(name, os.environ.get(name, ""))
        cluster.connect(cpus=2)
        yield
        cluster.disconnect()


def recorded(options) -> list[str]:
    """Return what the stages have recorded since the last call."""
    log = Path(options["log"])
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


def names(lines) -> list[str]:
    return list(dict.fromkeys(line.split()[0] for line in lines))


def states(outcomes) -> dict[str, str]:
    return {outcome.step.name: outcome.state for outcome in outcomes}


def walk(steps, store, *, executor="in_process", parallel=1, hooks=None):
    return GraphRun(steps, store=store, executor=executor, hooks=hooks or Silent(), parallel=parallel).walk()


def alone(function, options, name="alone", **more) -> Step:
    return Step(kind="report", name=name, function=function, config=Work(), options=options, **more)


# --- what is done stays done


def test_second_run_computes_nothing(store, options):
    steps = small_graph(options)
    first, second = walk(steps, store), walk(steps, store)
    assert names(recorded(options)) == ["listing", "shards", "training", "near", "far", "page"]
    assert set(states(first).values()) == {"done"}
    assert set(states(second).values()) == {"cached"}
    assert [outcome.receipt for outcome in second] == [outcome.receipt for outcome in first]


def test_steps_given_out_of_order_run_in_order(store, options):
    steps = small_graph(options)
    assert [outcome.step.name for outcome in walk([steps[-1]], store)] == [
        "listing", "shards", "near", "training", "far", "page",
    ]  # fmt: skip


def test_a_changed_field_runs_again_exactly_what_depends_on_it(store, options):
    listing, shards, training, near, far, page = small_graph(options)
    walk([page], store)
    recorded(options)
    other = dataclasses.replace(training, config=Work(30, 8))
    far = dataclasses.replace(far, inputs={"training": other})
    page = dataclasses.replace(page, inputs={"near": near, "far": far})
    outcomes = walk([listing, shards, other, near, far, page], store)
    assert names(recorded(options)) == ["training", "far", "page"]
    assert [name for name, state in states(outcomes).items() if state == "cached"] == ["listing", "shards", "near"]
    assert set(states(walk(small_graph(options), store)).values()) == {"cached"}  # the old ones are still there


def test_changed_resources_run_nothing_again(store, options, tmp_path):
    walk(small_graph(options), store)
    recorded(options)
    moved = options | {"tick_s": 1.0, "workers": 64, "zero_stage": 3}
    assert set(states(walk(small_graph(moved), store, parallel=4)).values()) == {"cached"}
    assert recorded(options) == []


def test_a_step_whose_receipt_was_deleted_runs_again_from_what_it_left(store, options):
    steps = small_graph(options)
    walk(steps, store)
    recorded(options)
    store.at(steps[1].directory).delete(RECEIPT)
    assert states(walk(steps, store))["shards"] == "done"
    assert recorded(options) == []  # its objects were all there


def test_two_different_steps_of_one_name_are_refused(store, options):
    twice = [alone(write, options), dataclasses.replace(alone(write, options), config=Work(9))]
    with pytest.raises(PipelineError, match="two different steps are named alone"):
        walk(twice, store)
    with pytest.raises(PipelineError, match="two different steps are named alone"):
        plan_graph(twice, store=store)
    assert list(store.list()) == []


def test_steps_of_one_name_run_side_by_side_in_a_graph_that_labels_them(store, options):
    one = alone(write, options, label="mask_ratio=0.4")
    other = dataclasses.replace(one, config=Work(9), label="mask_ratio=0.6")
    assert [row.step.title for row in plan_graph([one, other], store=store)] == [
        "alone [mask_ratio=0.4]", "alone [mask_ratio=0.6]",
    ]  # fmt: skip
    outcomes = walk([one, other], store)
    assert [(outcome.step.title, outcome.state) for outcome in outcomes] == [
        ("alone [mask_ratio=0.4]", "done"), ("alone [mask_ratio=0.6]", "done"),
    ]  # fmt: skip
    assert len({outcome.uri for outcome in outcomes}) == 2
    assert states(walk([dataclasses.replace(other, label="")], store)) == {"alone": "cached"}


# --- the plan


def test_the_plan_names_what_would_run_and_why_and_writes_nothing(store, options):
    listing, shards, _, near, _, page = small_graph(options)
    assert {row.state for row in plan_graph([page], store=store)} == {"to_run"}
    assert list(store.list()) == []
    walk([page], store)
    before = list(store.list())
    changed = dataclasses.replace(shards, config=Work(2, 5))
    near = dataclasses.replace(near, inputs={"shards": changed})
    rows = plan_graph([listing, changed, near], store=store, unable=["shards"])
    assert [(row.step.name, row.state, row.differs) for row in rows] == [
        ("listing", "cached", ()),
        ("shards", "blocked", ("config.ticks: 4 -> 5",)),
        ("near", "blocked", ("inputs.shards: changed",)),
    ]
    rows = plan_graph([listing, changed, near], store=store)
    assert [row.state for row in rows] == ["cached", "to_run", "to_run"]
    assert list(store.list()) == before
    assert rows[1].uri == store.at(changed.directory).uri


def test_the_plan_compares_with_the_most_similar_step_done_before():
    identity = {"name": "a", "version": 2, "config": {"lr": 0.1, "deep": {"sizes": [1, 2]}}}
    far = {"name": "a", "version": 1, "config": {"lr": 0.2, "deep": {"sizes": [1]}, "gone": 1}}
    near = {"name": "a", "version": 2, "config": {"lr": 0.1, "deep": {"sizes": [1]}}}
    assert nearest_difference(identity, [far, near]) == ("config.deep.sizes: [1] -> [1, 2]",)
    assert nearest_difference(identity, [far]) == (
        "config.deep.sizes: [1] -> [1, 2]",
        "config.gone: 1 -> absent",
        "config.lr: 0.2 -> 0.1",
        "version: 1 -> 2",
    )
    assert nearest_difference(identity, []) == ()
    assert dotted_fields(identity)["config.deep.sizes"] == [1, 2]


def test_a_step_whose_driver_died_right_after_the_receipt_is_remembered_too(store, options):
    steps = small_graph(options)
    walk(steps, store)
    for info in list(store.list("history/")):
        store.delete(info.key)
    walk(steps, store)
    [row] = plan_graph([dataclasses.replace(steps[0], config=Work(7, 4))], store=store)
    assert row.differs == ("config.value: 1 -> 7",)


# --- failures


def test_a_failing_step_blocks_only_what_needs_it(store, options):
    bad = alone(fails, options | {"broken": "DataError"}, "bad")
    needs = alone(write, options, "needs", inputs={"bad": bad})
    last = alone(write, options, "last", inputs={"needs": needs})
    free = alone(write, options, "free")
    outcomes = walk([bad, needs, last, free], store)
    assert states(outcomes) == {"bad": "failed", "needs": "blocked", "last": "blocked", "free": "done"}
    assert isinstance(outcomes[0].error, DataError)
    repaired = dataclasses.replace(bad, options=options | {"broken": ""})
    inputs = {"bad": repaired}
    needs = dataclasses.replace(needs, inputs=inputs)
    last = dataclasses.replace(last, inputs={"needs": needs})
    assert states(walk([repaired, needs, last, free], store)) == {
        "bad": "done", "needs": "done", "last": "done", "free": "cached",
    }  # fmt: skip


def test_an_unexpected_error_leaves_its_traceback_in_the_store(store, options):
    bad = alone(fails, options | {"broken": "ZeroDivisionError"})
    [outcome] = walk([bad], store)
    assert (outcome.state, type(outcome.error)) == ("failed", ZeroDivisionError)
    assert b"ZeroDivisionError: images/7.jpg" in store.at(bad.directory).read("failure/0001.txt")


def test_a_done_step_is_cached_though_its_input_cannot_be_made_again(store, options):
    bad = alone(fails, options | {"broken": ""}, "bad")
    needs = alone(write, options, "needs", inputs={"bad": bad})
    walk([bad, needs], store)
    store.at(bad.directory).delete(RECEIPT)
    bad = dataclasses.replace(bad, options=options | {"broken": "DataError"})
    needs = dataclasses.replace(needs, inputs={"bad": bad})
    assert states(walk([needs], store)) == {"bad": "failed", "needs": "cached"}


def test_a_damaged_receipt_fails_its_step_and_lets_the_others_go_on(store, options):
    damaged, free = alone(write, options, "damaged"), alone(write, options, "free")
    store.at(damaged.directory).write(RECEIPT, b"{")
    needs = alone(write, options, "needs", inputs={"damaged": damaged})
    outcomes = walk([damaged, needs, free], store)
    assert states(outcomes) == {"damaged": "failed", "needs": "blocked", "free": "done"}
    assert RECEIPT in str(outcomes[0].error)


def test_a_store_that_refuses_a_claim_fails_that_step_alone(store, options):
    shut, free = alone(write, options, "shut"), alone(write, options, "free")
    store.root.mkdir()
    (store.root / shut.directory).write_text("a file where the step's folder should be")
    hooks = Silent()
    outcomes = walk([shut, free], store, hooks=hooks)
    assert states(outcomes) == {"shut": "failed", "free": "done"}
    assert isinstance(outcomes[0].error, StorageError)
    assert hooks.begun == ["free"]  # no run in MLflow is left open for a step that never began


def test_code_that_differs_from_the_drivers_is_refused(store, options):
    step = alone(write, options)
    root = store.at(step.directory)
    attempt = Attempt(root.uri, 1, "", step.name, "0" * 64, Resources(), "in_process", progress=None, options=options)
    with pytest.raises(PipelineError, match="Install the same version of mae-pipeline on every machine"):
        execute_step(step, {}, attempt)
    assert recorded(options) == []


# --- stopping


class StopsAt(Silent):
    """Requests a stop at the first progress update of a step, in the middle of its work, as a signal would."""

    def __init__(self, step_name: str) -> None:
        super().__init__()
        self.step_name = step_name

    def progress(self, step_name, done, total, unit, fields):
        if step_name == self.step_name and not self.run.stopping:
            self.run.request_stop()


def stopped_walk(steps, store, step_name, *, executor="in_process", parallel=1):
    hooks = StopsAt(step_name)
    hooks.run = GraphRun(steps, store=store, executor=executor, hooks=hooks, parallel=parallel)
    return hooks.run.walk()


def test_a_stop_lets_a_step_save_and_the_next_run_goes_on_from_there(store, options):
    steps = small_graph(options | {"tick_s": 0.1})
    outcomes = stopped_walk(steps, store, "training")
    assert states(outcomes) == {
        "listing": "done", "shards": "done", "training": "stopped", "near": "stopped", "far": "stopped", "page": "stopped",
    }  # fmt: skip
    assert isinstance(outcomes[2].error, Stopped)
    assert store.at(steps[2].directory).exists(stop_request_key(1))
    walk(steps, store)  # the old request is for the first generation and stops no other
    lines = recorded(options)
    assert sorted(line for line in lines if line.startswith("training ")) == [f"training {link}" for link in range(8)]


def test_a_stop_cuts_off_a_step_that_cannot_save(store, options):
    steps = small_graph(options)
    outcomes = stopped_walk(steps, store, "near")
    assert states(outcomes)["near"] == "stopped"
    assert "the same command runs it again" in str(outcomes[3].error)
    assert states(outcomes)["far"] == "stopped"  # nothing new is started
    assert set(states(walk(steps, store)).values()) == {"done", "cached"}


def test_a_finished_step_is_reported_as_cached_in_a_stopped_run(store, options):
    steps = small_graph(options)
    walk(steps[:2], store)
    run = GraphRun([steps[0], steps[3]], store=store, executor="in_process", hooks=Silent())
    run.request_stop()
    assert states(run.walk()) == {"listing": "cached", "shards": "cached", "near": "stopped"}


def test_an_interrupt_without_a_request_stops_the_whole_run(store, options):
    class Interrupted(Silent):
        def progress(self, step_name, done, total, unit, fields):
            raise KeyboardInterrupt

    outcomes = walk([alone(write, options, "a"), alone(write, options, "b")], store, hooks=Interrupted())
    assert states(outcomes) == {"a": "stopped", "b": "stopped"}


def test_a_failure_while_stopping_is_still_a_failure(store, options):
    class Stopping(Silent):
        def begin(self, step):
            with contextlib.suppress(KeyboardInterrupt):
                self.run.request_stop()
            return ""

    hooks = Stopping()
    bad = alone(fails, options | {"broken": "DataError"}, resume_point=newest_link)
    hooks.run = GraphRun([bad], store=store, executor="in_process", hooks=hooks)
    assert states(hooks.run.walk()) == {"alone": "failed"}


# --- two drivers


class ClaimsToo(Silent):
    """Another driver, which claims a step as soon as this one runs it."""

    def __init__(self, root) -> None:
        super().__init__()
        self.root = root

    def progress(self, step_name, done, total, unit, fields):
        if step_name == "training" and len(claims(self.root)) == 1:
            claim(self.root, continues=newest_link(self.root))


def test_a_fenced_driver_stops_and_never_claims_again(store, options):
    steps = small_graph(options)
    root = store.at(steps[2].directory)
    outcomes = walk(steps, store, hooks=ClaimsToo(root))
    assert states(outcomes) == {
        "listing": "done", "shards": "done", "training": "stopped", "near": "stopped", "far": "stopped", "page": "stopped",
    }  # fmt: skip
    assert isinstance(outcomes[2].error, Fenced)
    assert claims(root) == [1, 2]
    assert claims(store.at(steps[3].directory)) == []


def test_two_drivers_at_once_end_in_one_result(tmp_path, store, options):
    walk_to_the_end(tmp_path / "alone", tick_s=0)
    together = tmp_path / "together"
    drivers = [Driver(together, tick_s=0.2), Driver(together, tick_s=0.2)]
    for driver in drivers:
        driver.go()
    ends = [driver.states() for driver in drivers]
    assert {state for end in ends for state in end.values()} <= {"done", "cached", "stopped"}
    assert any("stopped" not in end.values() for end in ends)  # one of them finished the graph
    assert results(together) == results(tmp_path / "alone")
    assert set(walk_to_the_end(together, tick_s=0).values()) == {"cached"}


# --- kills


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_driver_goes_on_to_the_same_results(seed, tmp_path):
    walk_to_the_end(tmp_path / "alone", tick_s=0)
    kills = kill_and_go_on(tmp_path / "killed", seed=seed, tick_s=0.04, span_s=0.8, executor="in_process")
    assert kills > 0  # its 28 ticks take longer than the span of the kills
    check_like_undisturbed(tmp_path / "killed", results(tmp_path / "alone"), kills=kills)


# --- on Ray


def test_the_graph_on_ray_is_the_graph_in_process(ray, store, options, tmp_path):
    steps = small_graph(options)
    hooks = Silent()
    assert set(states(walk(steps, store, executor="ray", hooks=hooks)).values()) == {"done"}
    assert (
        "listing",
        3,
        4,
        "ticks",
        {"half": 0.5},
    ) in hooks.updates or hooks.updates  # only the newest update is sure to arrive
    walk_to_the_end(tmp_path / "alone", tick_s=0)
    assert results(tmp_path) == results(tmp_path / "alone")
    assert set(states(walk(steps, store)).values()) == {"cached"}


def test_independent_steps_run_at_once(ray, store, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    steps = [alone(meets, {"meeting": str(meeting)}, name) for name in ("a", "b")]
    assert states(walk(steps, store, executor="ray", parallel=2)) == {"a": "done", "b": "done"}


def test_kinds_share_the_cluster_where_each_takes_its_part_of_it(ray, store, tmp_path):
    """A pretraining that fills half of the cluster and an evaluation that fills a quarter of it run at once."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    steps = [
        dataclasses.replace(alone(meets, {"meeting": str(meeting)}, name), kind=kind)
        for name, kind in (("a", "pretrain"), ("b", "evaluate"))
    ]
    room = {"pretrain": 2, "evaluate": 4}.__getitem__
    assert states(walk(steps, store, executor="ray", parallel=room)) == {"a": "done", "b": "done"}


def test_evaluations_run_side_by_side_as_many_as_fit_and_everything_else_alone(ray, store, options):
    """While two evaluations run, neither the third nor the pretraining starts."""
    kinds = {"pre": "pretrain", "a": "evaluate", "b": "evaluate", "c": "evaluate", "page": "report"}
    slow = options | {"tick_s": 0.1}
    steps = [dataclasses.replace(alone(write, slow, name), kind=kind) for name, kind in kinds.items()]

    class Counting(Silent):
        at_once = ()

        def begin(self, step):
            self.at_once += (({*self.begun} - {name for name, _ in self.ended}) | {step.name},)
            return super().begin(step)

    def room(kind):
        return 2 if kind == "evaluate" else 1

    hooks = Counting()
    assert set(states(walk(steps, store, executor="ray", parallel=room, hooks=hooks)).values()) == {"done"}
    first, second, third, fourth, fifth = hooks.at_once
    assert (first, second, third, fifth) == ({"pre"}, {"a"}, {"a", "b"}, {"page"})
    assert "c" in fourth
    assert len(fourth) <= 2  # 1 if the other two ended between two looks


def test_a_driver_that_has_lost_a_running_step_takes_no_other(ray, store, options):
    """Of two drivers that begin side by side, each would otherwise take a step of the other's, and both would stop."""

    class LosesTheFirst(Silent):
        def begin(self, step):
            if step.name == "second":
                pytest.fail("claimed a step after another driver had taken the first")
            claim(store.at(step.directory), continues="")
            return super().begin(step)

    slow = options | {"tick_s": 0.3}
    first, second = alone(write, slow, "first"), alone(write, slow, "second")
    outcomes = walk([first, second], store, executor="ray", parallel=2, hooks=LosesTheFirst())
    assert states(outcomes) == {"first": "stopped", "second": "stopped"}
    assert claims(store.at(second.directory)) == []


def test_errors_on_ray_arrive_as_themselves(ray, store, options):
    kinds = ["PipelineError", "DataError", "CheckpointError", "ZeroDivisionError"]
    steps = [alone(fails, options | {"broken": kind}, f"bad-{kind}") for kind in kinds]
    for outcome, kind in zip(walk(steps, store, executor="ray"), kinds, strict=True):
        assert (outcome.state, type(outcome.error).__name__) == ("failed", kind)
        assert str(outcome.error) == "images/7.jpg is not an image. Remove it"


def test_a_step_whose_process_dies_is_failed_and_done_the_next_time(ray, store, options):
    dying = alone(dies_once, options, "dying")
    needs, free = alone(write, options, "needs", inputs={"dying": dying}), alone(write, options, "free")
    outcomes = walk([dying, needs, free], store, executor="ray")
    assert states(outcomes) == {"dying": "failed", "needs": "blocked", "free": "done"}
    assert isinstance(outcomes[0].error, PipelineError)
    message = str(outcomes[0].error)
    assert message.startswith("the process that coordinated the step died (")
    assert message.endswith("Run the same command again")
    assert "\n" not in message
    assert states(walk([dying, needs, free], store, executor="ray")) == {
        "dying": "done",
        "needs": "done",
        "free": "cached",
    }
    receipt = read_receipt(store.at(dying.directory))
    assert [file.key for file in receipt.files] == [OUT]
    assert receipt.generation == 2


def test_a_stop_on_ray_saves_what_can_save_and_cuts_off_the_rest(ray, store, options):
    slow = options | {"tick_s": 0.2}
    saves = Step(
        kind="report", name="saves", function=count, config=Work(1, 200), options=slow, resume_point=newest_link
    )
    cannot = Step(kind="report", name="cannot", function=write, config=Work(2, 200), options=slow)
    outcomes = stopped_walk([saves, cannot], store, "saves", executor="ray", parallel=2)
    assert states(outcomes) == {"saves": "stopped", "cannot": "stopped"}
    assert "saved" in str(outcomes[0].error)
    assert "interrupted" in str(outcomes[1].error)
    assert read_receipt(store.at(cannot.directory)) is None


def test_a_fence_on_ray_stops_the_other_running_steps(ray, store, options):
    slow = options | {"tick_s": 0.2}
    fenced = Step(kind="report", name="training", function=write, config=Work(1, 200), options=slow)
    saves = Step(
        kind="report", name="saves", function=count, config=Work(1, 200), options=slow, resume_point=newest_link
    )
    hooks = ClaimsToo(store.at(fenced.directory))
    outcomes = walk([fenced, saves], store, executor="ray", parallel=2, hooks=hooks)
    assert [type(outcome.error) for outcome in outcomes] == [Fenced, Stopped]
    assert json.loads(store.at(saves.directory).read(stop_request_key(1))) == {}
