"""Generations fence; receipts stand."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from graph_stages import Work, write

from pipeline.errors import DataError, Fenced, StorageError
from pipeline.graph.receipts import RECEIPT, check_fence, claim, claims, read_claim, read_receipt, write_receipt
from pipeline.graph.step import StageResult, Step
from pipeline.storage import FileStore
from pipeline.storage.s3 import S3Store

STEP = Step(kind="shard", name="listing", function=write, config=Work(1))


@pytest.fixture(params=["folder", "s3"])
def root(request, tmp_path):
    if request.param == "folder":
        return FileStore(tmp_path).at(STEP.directory)
    return S3Store(request.getfixturevalue("s3_bucket")).at(STEP.directory)


def complete(root, generation, facts):
    root.write(f"g{generation:04d}/out.txt", b"words")
    return write_receipt(root, STEP, generation, StageResult(facts, ("out.txt",)), seconds=1.5)


def test_racing_drivers_claim_distinct_generations(root):
    together = threading.Barrier(8)

    def race(_):
        together.wait()
        return [claim(root, continues="g0000/x") for _ in range(3)]

    with ThreadPoolExecutor(8) as racers:
        won = [generation for mine in racers.map(race, range(8)) for generation in mine]
    assert sorted(won) == claims(root) == list(range(1, 25))
    assert read_claim(root, 24)["continues"] == "g0000/x"


def test_a_higher_generation_fences_the_lower_and_not_itself(root):
    first = claim(root, continues="")
    check_fence(root, first)
    second = claim(root, continues="")
    check_fence(root, second)
    with pytest.raises(Fenced, match=f"generation {second} was claimed by another run while {first} was at work"):
        check_fence(root, first)


def test_a_fenced_generation_writes_no_receipt(root):
    first = claim(root, continues="")
    claim(root, continues="")
    with pytest.raises(Fenced):
        complete(root, first, {})
    assert read_receipt(root) is None


def test_the_first_receipt_stands(root):
    first = complete(root, claim(root, continues=""), {"score": 1})
    second = complete(root, claim(root, continues=""), {"score": 2})
    assert second == first == read_receipt(root)
    assert first.facts == {"score": 1}


def test_racing_receipts_are_one(root):
    # all have passed the fence; the slower ones get what the quickest wrote
    generation = claim(root, continues="")
    with ThreadPoolExecutor(4) as racers:
        receipts = list(racers.map(lambda score: complete(root, generation, {"score": score}), range(4)))
    assert receipts == [read_receipt(root)] * 4


def test_a_receipt_is_the_same_fresh_and_read_again(root):
    # otherwise a stage would see tuples and integer keys in the run that made its input, and lists and text keys in the next
    fresh = complete(root, claim(root, continues=""), {"shape": (1, 2), "per_label": {7: 1}})
    assert fresh == read_receipt(root)
    assert fresh.facts == {"shape": [1, 2], "per_label": {"7": 1}}


def test_a_receipt_says_what_was_made_and_of_what(root):
    receipt = complete(root, claim(root, continues=""), {"score": 1})
    assert (receipt.step, receipt.fingerprint, receipt.identity) == (STEP.name, STEP.fingerprint, STEP.identity())
    [file] = receipt.files
    assert (file.key, file.bytes) == ("out.txt", 5)
    assert file.sha256 == hashlib.sha256(b"words").hexdigest()
    assert receipt.made["seconds"] == 1.5
    assert receipt.made["versions"]["torch"]
    given = receipt.as_input(root.uri)
    assert (given.fingerprint, given.facts, given.made) == (STEP.fingerprint, {"score": 1}, receipt.made)
    assert given.store.read("out.txt") == given.root.read("g0001/out.txt") == b"words"


def test_an_output_that_was_not_written_makes_no_receipt(root):
    with pytest.raises(StorageError, match=r"missing\.txt"):
        write_receipt(root, STEP, claim(root, continues=""), StageResult({}, ("missing.txt",)), seconds=0)
    assert read_receipt(root) is None


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b"\xff", b'{"files": [{"key": "a"}]}', b'{"files": [], "later": 1}']
)
def test_a_damaged_receipt_is_an_error_and_does_not_count_as_missing(damage, tmp_path):
    root = FileStore(tmp_path)
    root.write(RECEIPT, damage)
    with pytest.raises(DataError, match=f"{tmp_path}/{RECEIPT} is not a receipt .*Delete it"):
        read_receipt(root)


def test_a_receipt_is_plain_json(root):
    complete(root, claim(root, continues=""), {"score": 1})
    assert json.loads(root.read(RECEIPT))["identity"]["config"] == {"value": 1, "ticks": 4}
