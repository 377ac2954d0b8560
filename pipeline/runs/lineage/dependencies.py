"""What a score was made from, back to the source, and which scores depend on a shard, an image or any other file of a store.

Receipts alone are read: fingerprints lead from a step to its inputs, and the store's history leads from a step to its readers. Only
steps that read the split of a shard or image depend on it: pretraining reads `train`, an evaluation also the split that it scores.
Errors: DataError for a file that no finished step wrote or read; StorageError."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.dataset.facts import DatasetFacts, SnapshotFacts
from pipeline.evaluation.protocol import ScoreFacts
from pipeline.reporting.comparison.lineage import Lineage, Node
from pipeline.reporting.format import count
from pipeline.runs.comparing.history import FinishedStep, is_, made_at
from pipeline.runs.lineage.places import Place

ENCODER_FILE, MANIFEST_FILE, LISTING_FILE = "encoder.safetensors", "manifest.json", "snapshot.parquet"
_DATA, _ENCODERS = {"shard", "join"}, {"pretrain", "import"}


def lineage_of(title: str, steps: Mapping[str, FinishedStep]) -> Lineage:
    """Return what the scores of a run were made from or, without any, what its encoder was."""
    nodes = nodes_of(steps.values())
    known = {step.receipt.fingerprint: step for step in steps.values()}
    roots = [id_ for id_, step in known.items() if is_(step, "evaluate") and not step.receipt.facts.get("skipped")]
    roots = roots or [id_ for id_, step in known.items() if step.receipt.kind in _ENCODERS] or list(known)[-1:]
    below = {id_: [source for source in node.sources if source in nodes] for id_, node in nodes.items()}
    gone = sorted({source[:12] for node in nodes.values() for source in node.sources if source not in nodes})
    notes = [f"not in the store any more: the step with fingerprint {short}" for short in gone]
    return Lineage(title=title, nodes=_reached(nodes, roots, below), roots=roots, below=below, notes=notes)


def dependents(place: Place, steps: Iterable[FinishedStep]) -> Lineage:
    """Return everything in a store that was made from a file of one of its steps."""
    readers = {step.receipt.fingerprint: step for step in steps if not is_(step, "report")}
    root = Node(id="file", kind=place.kind, name=place.name, text=place.text, uri=place.uri)
    nodes = {**nodes_of(readers.values()), root.id: root}
    below: dict[str, list[str]] = {root.id: [place.step.receipt.fingerprint] if place.read else []}
    for id_, step in readers.items():
        for source in step.inputs.values():
            if source in readers and _reads(step, readers[source], place.split):
                below.setdefault(source, []).append(id_)
    reached = _reached(nodes, [root.id], below)
    shown = {
        id_: _in_order(ids, of=id_, reached=reached, readers=readers) for id_, ids in below.items() if id_ in reached
    }
    scores = sum(node.kind == "score" for node in reached.values())
    notes = [*place.notes, f"{scores} scores depend on it" if place.read else "nothing depends on it"]
    return Lineage(title=place.title, nodes=reached, roots=[root.id], below=shown, notes=notes)


def _in_order(
    ids: Sequence[str], *, of: str, reached: Mapping[str, Node], readers: Mapping[str, FinishedStep]
) -> list[str]:
    """Return what to show below a node, scores first. A score of an encoder that is shown too stands below that alone."""
    encoders = {id_ for id_ in reached if id_ in readers and readers[id_].receipt.kind in _ENCODERS}
    kept = [one for one in ids if of in encoders or not encoders & {*readers[one].inputs.values()}]
    return sorted(kept, key=lambda one: (reached[one].kind != "score", reached[one].name))


def _reads(step: FinishedStep, source: FinishedStep, split: str) -> bool:
    """Return whether a step reads what is in question of one of its inputs. An empty split: all of it."""
    if not split or source.receipt.kind not in _DATA:
        return True
    if is_(step, "evaluate"):
        return split in {"train", ScoreFacts.read(step.receipt.facts).split or "test"}
    return split == "train" or is_(step, "join")


def _reached(nodes: Mapping[str, Node], roots: Sequence[str], below: Mapping[str, Sequence[str]]) -> dict[str, Node]:
    reached: dict[str, Node] = {}
    left = list(roots)
    while left:
        if (id_ := left.pop(0)) not in reached:
            reached[id_] = nodes[id_]
            left += below.get(id_, ())
    return reached


def nodes_of(steps: Iterable[FinishedStep]) -> dict[str, Node]:
    """Return the nodes of steps, by id: a step's fingerprint and, for what is inside it, the fingerprint with a word behind it."""
    return {node.id: node for step in steps for node in _nodes(step)}


def _nodes(step: FinishedStep) -> list[Node]:
    receipt = step.receipt
    common: dict[str, Any] = {
        "name": receipt.step,
        "fingerprint": receipt.fingerprint,
        "time": made_at(step),
        "generation": receipt.generation,
        "id": receipt.fingerprint,
    }
    inputs = tuple(step.inputs.values())
    if is_(step, "evaluate"):
        return [Node(kind="score", text=_score_text(step), uri=step.files.uri, sources=inputs, **common)]
    if is_(step, "pretrain"):
        return _encoder_nodes(step, common, inputs)
    if is_(step, "import"):
        return _imported_nodes(step, common)
    if receipt.kind in _DATA:
        return _dataset_nodes(step, common, inputs)
    if is_(step, "snapshot"):
        return _listing_nodes(step, common, inputs)
    return [Node(kind=receipt.kind, uri=step.files.uri, sources=inputs, **common)]


def _encoder_nodes(step: FinishedStep, common: Mapping[str, Any], inputs: Sequence[str]) -> list[Node]:
    key = str(step.receipt.made.get("notes", {}).get("checkpoint", ""))
    id_ = f"{step.receipt.fingerprint}/checkpoint"
    facts = step.receipt.facts
    text = f"{count(facts['images_seen'])} images seen, loss {facts['loss']:.4f}"
    start = step.receipt.identity["config"].get("start")
    parent = f"; continues from {start['checkpoint']}" if start else ""
    encoder = Node(
        kind="encoder",
        digest=_sha256(step, ENCODER_FILE),
        uri=f"{step.files.uri}/{ENCODER_FILE}",
        text=text,
        sources=(id_,),
        **common,
    )
    uri = f"{step.root.uri}/{key}" if key else step.root.uri
    made = Node(
        id=id_,
        kind="checkpoint",
        name=key.rpartition("/")[2],
        uri=uri,
        text=f"step {facts['global_step']}{parent}",
        sources=tuple(inputs),
    )
    return [encoder, made]


def _imported_nodes(step: FinishedStep, common: Mapping[str, Any]) -> list[Node]:
    id_, file = f"{step.receipt.fingerprint}/weights", str(step.receipt.made.get("notes", {}).get("file", "weights"))
    digest = str(step.receipt.identity["config"]["sha256"])
    encoder = Node(
        kind="encoder",
        digest=_sha256(step, ENCODER_FILE),
        uri=f"{step.files.uri}/{ENCODER_FILE}",
        sources=(id_,),
        **common,
    )
    return [encoder, Node(id=id_, kind="weights", name=file, digest=digest)]


def _dataset_nodes(step: FinishedStep, common: Mapping[str, Any], inputs: Sequence[str]) -> list[Node]:
    facts, id_ = DatasetFacts.read(step.receipt.facts), f"{step.receipt.fingerprint}/shards"
    splits = ", ".join(f"{split} {count(one.served)}" for split, one in facts.counts.splits.items())
    # a join has no shards of its own: those of its parts are below the parts
    below = inputs if is_(step, "join") else (id_,)
    dataset = Node(
        kind="dataset",
        digest=facts.digest,
        uri=f"{step.files.uri}/{MANIFEST_FILE}",
        text=splits,
        sources=tuple(below),
        **common,
    )
    if is_(step, "join"):
        return [dataset]
    return [
        dataset,
        Node(id=id_, kind="shards", name=f"{facts.shards} tars", uri=f"{step.root.uri}/shards", sources=tuple(inputs)),
    ]


def _listing_nodes(step: FinishedStep, common: Mapping[str, Any], inputs: Sequence[str]) -> list[Node]:
    facts, id_ = SnapshotFacts.read(step.receipt.facts), f"{step.receipt.fingerprint}/source"
    listing = Node(
        kind="listing",
        digest=_sha256(step, LISTING_FILE),
        uri=f"{step.files.uri}/{LISTING_FILE}",
        text=f"{count(facts.listed)} listed",
        sources=(id_, *inputs),
        **common,
    )
    return [listing, Node(id=id_, kind="source", name=facts.source)]


def _score_text(step: FinishedStep) -> str:
    facts = ScoreFacts.read(step.receipt.facts)
    if facts.score is None:
        return f"not evaluated: {facts.skipped}"
    value = f"{facts.measure} {facts.score:.1f}" if facts.measure else f"{100 * facts.score:.1f} %"
    of = f"{value} of {count(facts.images)} images" if facts.images else value
    encoder = step.inputs.get("pretrain")
    return f"{of}, encoder {encoder[:12]}" if encoder else of


def _sha256(step: FinishedStep, key: str) -> str:
    return next((file.sha256 for file in step.receipt.files if file.key == key), "")
