"""A run's numbers and its note, from histories made by hand."""

import pytest

from pipeline.cluster.resources import Resources
from pipeline.config import RunConfig
from pipeline.reporting.summaries import Score, as_metrics
from pipeline.runs.recording.note import note
from pipeline.runs.recording.results import cost_metrics, curve, linear_score, pretraining_metrics
from pipeline.tracking import names
from pipeline.training.facts import PretrainFacts

FACTS = PretrainFacts(global_step=3, ids_digest="1", loss=0.4, images_seen=3600, dataset_digest="d")


def rows(**more: float) -> list[dict[str, float]]:
    """Return a history in which half an hour, a quarter and an hour pass."""
    made = [(600, 0.9, 1 / 3), (1500, 0.3, 1.0), (3300, 0.4, 0.5)]
    return [{"images": i, "loss": loss, "images_per_s": s, "mfu": s / 10, "time": 5.0, **more} for i, loss, s in made]


def test_losses_and_the_middle_speed():
    assert pretraining_metrics(FACTS, rows()) == {
        names.FINAL_LOSS: 0.4,
        names.BEST_LOSS: 0.3,
        names.IMAGES_PER_S: 0.5,
        names.MFU: 0.05,
    }
    assert pretraining_metrics(FACTS, []) == {names.FINAL_LOSS: 0.4}


def test_the_curve_is_over_images_seen():
    assert curve(rows()) == [(600, 0.9, 5000), (1500, 0.3, 5000), (3300, 0.4, 5000)]


def test_hours_are_those_of_the_workers_that_there_were_and_of_gpus_if_there_were_any():
    hours = 1800 / 3600 + 900 / 3600 + 3600 / 3600
    two_cpus = Resources(cpus_per_worker=2, workers=3)
    assert cost_metrics(rows(workers=4), [], two_cpus, usd_per_hour=None) == {names.CPU_HOURS: pytest.approx(8 * hours)}
    assert cost_metrics(rows(), [], two_cpus, usd_per_hour=None)[names.CPU_HOURS] == pytest.approx(6 * hours)
    on_gpus = cost_metrics(rows(workers=4, device_gib=1.0), [], two_cpus, usd_per_hour=2.0)
    assert on_gpus == {names.GPU_HOURS: pytest.approx(4 * hours), names.COST_USD: pytest.approx(8 * hours)}


def score(encoder: str, *values: float, protocol: str = "linear") -> Score:
    return Score(protocol=protocol, dataset="cats", encoder=encoder, values=values)


def test_scores_have_spread_and_number():
    assert as_metrics([score("pretrained", 0.5, 0.7), score("random", 0.25)]) == {
        "score/linear/cats/pretrained": pytest.approx(0.6),
        "score_n/linear/cats/pretrained": 2,
        "score_sd/linear/cats/pretrained": pytest.approx(0.1 * 2**0.5),
        "score/linear/cats/random": 0.25,
        "score_n/linear/cats/random": 1,
    }


def test_the_models_score_is_the_pretrained_encoders():
    found = linear_score([score("random", 0.2), score("pretrained", 0.9, protocol="knn"), score("pretrained", 0.5)])
    assert found == score("pretrained", 0.5)
    assert linear_score([score("random", 0.2)]) is None


def test_the_note_begins_with_what_came_out_and_hides_secrets():
    config = RunConfig.model_validate({"data": {"source": "/data/cats"}, "model": {"mask_ratio": 0.5}})
    text = note(
        config,
        verdict="stopped",
        steps=[("pretrain", "done", 75.0)],
        scores=[score("pretrained", 0.5, 0.7), score("random", 0.25)],
        metrics={names.FINAL_LOSS: 0.4, names.GPU_HOURS: 12.0},
        links={"pretrain": "#/experiments/1/runs/ab"},
        addresses={"tracking": "http://me:secret@host"},
    )
    plain = text.replace("&ensp;", "")
    assert plain.startswith("**Stopped, nothing is lost.** ViT-B/16 pretrained on cats, 800 epochs at a batch of 4096.")
    assert "| cats| linear| 60.0 ± 14.1 %| 25.0 %| +35.0| 2|" in plain
    assert "final loss 0.4, 12 GPU-hours" in text
    assert "`mask_ratio=0.5`" in text
    assert "| [pretrain](#/experiments/1/runs/ab)| done| 1:15|" in plain
    assert "mae run config.yaml" in text
    assert "secret" not in text
