"""What a training leaves in its receipt."""

import pytest

from pipeline.data.feed.substitution import Substitution
from pipeline.errors import DataError
from pipeline.training.facts import IncidentFacts, PretrainFacts, TrainingFacts, incident_fields
from pipeline.training.guard import FRESH, GuardState


def made(count, epoch):
    return [Substitution(id_, id_ + 1, epoch, 5, "crc32", f"{id_}.jpg") for id_ in range(count)]


def test_a_receipt_records_which_images_were_substituted_and_how_often():
    assert IncidentFacts(**incident_fields([], FRESH)).as_json() == {"substitutions": 0, "skipped_steps": 0}
    facts = IncidentFacts(
        **incident_fields([*made(2, 0), *made(2, 1)], GuardState(skipped=(3,), stepped_over=((5, 8),)))
    )
    assert facts.as_json() == {
        "substitutions": 4,
        "substituted": [[0, "0.jpg", "crc32"], [1, "1.jpg", "crc32"]],
        "skipped_steps": 1,
        "stepped_over": [[5, 8]],
    }
    assert IncidentFacts.read(facts.as_json()) == facts


def test_what_a_later_version_adds_is_ignored_and_what_is_missing_is_named():
    known = {"global_step": 3, "ids_digest": "7"}
    assert TrainingFacts.read(known | {"of_a_later_version": 1}) == TrainingFacts(**known)
    with pytest.raises(DataError, match=r"PretrainFacts cannot be read: loss: Field required\. Delete .*receipt\.json"):
        PretrainFacts.read(known)
