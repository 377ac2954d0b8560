"""What a listing understood, counted while it streams: labels by split, files that were passed over, classes that look alike.

Units: counts are of images or files. Memory: one count per split and class, and at most 10,000 folder names per depth."""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import pyarrow.compute as pc

from pipeline.data.dataset.facts import SplitLabels
from pipeline.data.dataset.schema import NO_LABEL, SampleTable

HIDDEN = "hidden"
EXAMPLES = 3
_FOLDERS_MAX = 10_000
_ENDINGS_SHOWN = 8
_BESIDE_IMAGES = frozenset(
    (
        ".txt",
        ".json",
        ".jsonl",
        ".xml",
        ".csv",
        ".tsv",
        ".md",
        ".html",
        ".htm",
        ".yaml",
        ".yml",
        ".py",
        ".ipynb",
        ".pdf",
        ".mat",
        ".npy",
        ".npz",
        ".pkl",
        ".log",
        ".db",
        ".ini",
        ".zip",
        ".sha256",
        ".md5",
    )
)
"""Endings of files that lie beside images and are none."""


class SplitTally:
    """Counts images by split and label."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[int]] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, splits: Sequence[str], labels: Sequence[int], paths: Sequence[str] = ()) -> None:
        """Count images. `paths`: of the same images, for examples."""
        for (split, label), count in Counter(zip(splits, labels, strict=True)).items():
            self._counts.setdefault(split, Counter())[label] += count
        for split in set(splits):
            shown = self._examples.setdefault(split, [])
            if paths and len(shown) < EXAMPLES:
                shown += [path for one, path in zip(splits, paths, strict=True) if one == split][
                    : EXAMPLES - len(shown)
                ]

    def add_served(self, split: str, samples: SampleTable) -> None:
        """Count the served samples of a shard."""
        counts = pc.value_counts(samples.filter(samples.column("served")).column("label")).to_pylist()
        self._counts.setdefault(split, Counter()).update({row["values"]: row["counts"] for row in counts})

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split, by the split's name in order."""
        return {split: labels.total() for split, labels in sorted(self._counts.items())}

    @property
    def unlabelled(self) -> int:
        """Images without a label."""
        return sum(labels[NO_LABEL] for labels in self._counts.values())

    def splits(self, classes: Sequence[str], *, also: Iterable[str] = ()) -> dict[str, SplitLabels]:
        """Return what is known of each split. `classes`: the name of each label; `also`: splits that may have no image."""
        in_train = self._counts.get("train", Counter())
        found = {}
        for split in sorted({*self._counts, *also}):
            labels = self._counts.get(split, Counter())
            present = sorted(label for label in labels if label != NO_LABEL)
            found[split] = SplitLabels(
                images=labels.total(),
                labelled=labels.total() - labels[NO_LABEL],
                classes=len(present),
                not_in_train=tuple(classes[label] for label in present if label not in in_train)[:EXAMPLES],
                examples=tuple(self._examples.get(split, ())),
            )
        return found


class PassedOver:
    """Counts the files of a source that are neither images, tars nor tables."""

    def __init__(self) -> None:
        self.total = 0
        self._endings: Counter[str] = Counter()
        self._folders: list[dict[str, Counter[str]]] = []
        """Per depth: folder -> endings."""

    def add_all(self, paths: Iterable[str]) -> None:
        """Count files."""
        for path in paths:
            *folders, name = path.split("/")
            hidden = path.startswith(".") or "/." in path
            # hidden files are counted apart: systems write them, so their endings tell nothing about the source
            ending = HIDDEN if hidden else _ending(name)
            self.total += 1
            self._endings[ending] += 1
            if hidden or ending in _BESIDE_IMAGES:
                continue
            self._folders += [{} for _ in range(len(folders) - len(self._folders))]
            for known, folder in zip(self._folders, folders, strict=False):
                # a known folder is counted even when no more new ones are kept
                if folder in known or len(known) < _FOLDERS_MAX:
                    known.setdefault(folder, Counter())[ending] += 1

    @property
    def by_ending(self) -> dict[str, int]:
        """Files by ending, most frequent first; rare endings together as `other`."""
        shown = dict(self._endings.most_common(_ENDINGS_SHOWN))
        rest = self.total - sum(shown.values())
        return shown | ({"other": rest} if rest else {})

    def emptied(self, folders: Sequence[Collection[str]], depth: int) -> tuple[str, ...]:
        """Return a note on the class folders of which nothing is left. `folders`: those with images, by depth."""
        with_images = folders[depth] if depth < len(folders) else ()
        lost = {
            folder: endings
            for folder, endings in (self._folders[depth] if depth < len(self._folders) else {}).items()
            if folder not in with_images
        }
        if not lost or not with_images:
            return ()
        shown = [f"{folder}/ ({_endings_text(lost[folder])})" for folder in sorted(lost)[:EXAMPLES]]
        more = f" and {len(lost) - EXAMPLES} more" if len(lost) > EXAMPLES else ""
        return (
            f"no image is left of {', '.join(shown)}{more}: convert these files to .jpg or .png, or remove the folder",
        )


def notes_on_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a note on classes that differ only in case, in blanks or in how Unicode writes their letters."""
    # NFKC: file names from macOS spell é as two characters, so one class can arrive in two forms
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if not groups:
        return ()
    # ascii() shows the difference that the eye cannot see
    shown = "; ".join(" and ".join(map(ascii, names)) for names in groups[:EXAMPLES])
    more = f" and {len(groups) - EXAMPLES} more" if len(groups) > EXAMPLES else ""
    return (
        f"classes that differ only in case, blanks or Unicode form stay apart: {shown}{more}. Rename them if they are one",
    )


def _endings_text(endings: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in Counter(endings).most_common(EXAMPLES))


def _ending(name: str) -> str:
    """`.heic`; of `x.jpg?w=300` and `x.jpg.1`, as downloaders name files, `.jpg?...` and `.jpg.1`."""
    before, mark, _ = name.partition("?")
    stem, dot, suffix = before.rpartition(".")
    if not dot or not stem:
        return "no ending"
    if suffix.isdecimal() and "." in stem:
        return f".{stem.rpartition('.')[2]}.{suffix}".lower()
    return f".{suffix.lower()}{'?...' if mark else ''}"
