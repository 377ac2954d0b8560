"""Facts in the receipts of a snapshot step (a listing) and of shard and join steps (a dataset).

Units: counts are of images; shares are fractions in [0, 1]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.data.sources.label_tables import TableUse
from pipeline.data.sources.listing import SourceKind
from pipeline.data.sources.splits import SplitOrigin
from pipeline.graph.facts import Facts

ScoredSplit = Literal["test", "val"]
"""The split on which encoders are scored."""


@dataclass(frozen=True, kw_only=True)
class SplitLabels:
    """How the images of a split are labelled."""

    images: int
    """Those that a snapshot lists, or that a dataset serves."""
    labelled: int
    classes: int
    """Classes that have an image in this split."""
    not_in_train: tuple[str, ...] = ()
    """Up to three of the classes that have an image in this split and none in `train`."""
    examples: tuple[str, ...] = ()
    """Up to three paths; empty for a dataset."""


@dataclass(frozen=True, kw_only=True)
class Understood:
    """How a source was read, for people to check."""

    origin: SplitOrigin
    """What gave the images their splits."""
    splits: Mapping[str, SplitLabels]
    passed_over: Mapping[str, int]
    """Ending -> files that are neither images, tars nor tables; hidden files are under `hidden`."""
    notes: tuple[str, ...] = ()
    """What looks like a mistake: class folders of which nothing is left, labels that differ only in case."""


@dataclass(frozen=True, kw_only=True)
class SnapshotFacts(Facts):
    """What a snapshot lists."""

    kind: SourceKind = "images"
    """What the source holds."""
    listed: int
    """Images. For a source of tars, the tars: their images are counted when they are indexed."""
    ignored: int
    """Files that are neither images, tars nor tables."""
    classes: tuple[str, ...]
    splits: Mapping[str, int]
    """Split -> listed images (or tars)."""
    source: str
    unlabelled: int | None = None
    """Images without a label, if a labels file or a table assigns the labels."""
    labels_sha256: str | None = None
    """Of the labels file, if there is one."""
    known: int | None = None
    """Later parts only: files that an earlier part lists."""
    changed: int | None = None
    """Later parts only: files whose size has changed since an earlier part listed them. They are listed again."""
    gone: int | None = None
    """Later parts only: files that an earlier part lists and the source no longer holds."""
    understood: Understood | None = None
    """None in the receipts of older versions; `pipeline.runs.checking.findings` then takes it from snapshot.parquet."""
    label_tables: Mapping[str, TableUse] | None = None
    """Path -> a table beside the images that labels those whose folders do not (`sources/label_tables.py`)."""
    image_folders: bool | None = None
    """True if every image lies in a folder such as `images`, which is no label."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the images of a split: listed = stored + quarantined, stored = served + duplicates."""

    listed: int = 0
    stored: int = 0
    served: int = 0
    """Those that training reads."""
    duplicates: int = 0
    """Stored but not served: the bytes equal those of another sample of the split."""
    quarantined: int = 0


@dataclass(frozen=True, kw_only=True)
class DatasetCounts:
    """Counts of a whole dataset."""

    total: Counts
    splits: Mapping[str, Counts]


@dataclass(frozen=True, kw_only=True)
class QuarantinedImage:
    """An example from quarantine.parquet."""

    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NearPair:
    """Sources of two images that show the same picture."""

    held_out: str
    train: str
    held_out_label: str = ""
    """Its class; empty if there is no label."""
    train_label: str = ""
    similarity: float | None = None
    """Correlation of the aligned thumbnails; None in receipts of older versions."""


@dataclass(frozen=True, kw_only=True)
class NearDuplicateFacts:
    """Images of val and test that show the same picture as one of train (`pipeline.data.dataset.near_duplicates`)."""

    pairs: int
    held_out: int
    compared: int
    flat: int
    distance: int
    """Bits of the perceptual hashes within which pairs were looked for."""
    examples: tuple[NearPair, ...]
    aligned: int | None = None
    """Pairs whose pixels were compared. None in receipts of older versions, which judged by the hashes alone."""
    same_pixels: int = 0
    """Held-out images with exactly the pixels of a training image."""
    conflicting: int = 0
    """Held-out images with another label than the training image."""
    unread: int = 0
    """Images that could not be read again for the comparison."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """A source and the class that it has there."""

    source: str
    label: str


@dataclass(frozen=True, kw_only=True)
class ContradictionFacts:
    """Images of equal bytes with different labels. Each label keeps one copy of the image in each split."""

    images: int
    """Distinct images."""
    copies: int
    """Stored samples of these images that have a label."""
    examples: tuple[tuple[LabelledImage, LabelledImage], ...]


@dataclass(frozen=True, kw_only=True)
class CopyFacts:
    """Images that are stored more than once, byte for byte."""

    images: int
    """Distinct images with a copy, in one split or in several."""
    across: int
    """Those that are in more than one split."""
    conflicting: int
    """Those of `across` whose copies have different labels."""
    examples: tuple[tuple[LabelledImage, LabelledImage], ...]
    """Copies in two splits; different labels first."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts(Facts):
    """What a shard or join step made."""

    digest: str
    """The manifest's: the identity of the dataset."""
    counts: DatasetCounts
    classes: tuple[str, ...]
    shards: int
    splits: tuple[str, ...]
    quarantined: int = 0
    bad_share: float = 0.0
    """Share of the listed images that are in quarantine."""
    quarantine_examples: tuple[QuarantinedImage, ...] = ()
    duplicates_across_splits: int = 0
    copies: CopyFacts | None = None
    """None in the receipts of older versions."""
    near_duplicates_across_splits: NearDuplicateFacts | None = None
    other_members: int | None = None
    """Indexed tars only: files that belong to no sample."""
    other_reasons: Mapping[str, int] | None = None
    """Indexed tars only: why they belong to none -> files."""
    other_examples: Mapping[str, tuple[str, ...]] | None = None
    """Indexed tars only: reason -> sources of a few of them."""
    quarantine_reasons: Mapping[str, int] | None = None
    """Reason -> images."""
    repaired: int | None = None
    """Images that were re-encoded because of a fault that cost no pixel."""
    contradicting_labels: ContradictionFacts | None = None
    duplicates_across_parts: int | None = None
    """Joins only: images of one part whose bytes another part holds too."""
    parts: Mapping[str, Counts] | None = None
    """Joins only: the counts of each part, by snapshot name."""
    keys_from: Literal["store"] | None = None
    """Joins only: shard keys are relative to the run's store rather than to the step's directory."""
    labels: Mapping[str, SplitLabels] | None = None
    """By split, of the served images. None in the receipts of older versions; `labels_of` then counts them."""

    @property
    def panel_split(self) -> Literal["test", "train"]:
        """The split whose images show reconstructions: held-out ones if there are any."""
        test = self.counts.splits.get("test")
        return "test" if test and test.served else "train"


def unsuited(
    classes: Sequence[str], labels: Mapping[str, SplitLabels], split: ScoredSplit, *, learns: bool = True
) -> str:
    """Return why nothing can be scored on a split, or an empty string if it can.

    `labels`: of all splits of the dataset. `learns`: whether labelled images of train are needed, too."""
    if not classes:
        return "no labels"
    if split not in labels:
        return f"no {split} split"
    if not labels[split].images:
        return f"the {split} split serves no image"
    for name in ("train", split) if learns else (split,):
        known = labels.get(name)
        if known is None or not known.labelled:
            return f"no labelled image in the {name} split"
        if learns and known.classes == 1:
            return f"all labelled images of the {name} split are of one class"
    return ""
