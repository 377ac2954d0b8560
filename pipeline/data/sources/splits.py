"""Splits and labels from the names of folders and files, or by a keyed hash where the names say nothing.

Words for splits: `words.py`.
Images: a level of folders on which every image has such a word is the split, wherever it is in the path. The label is the first
folder below it (`data/train/cat/x.jpg`) or, if there is none, the one folder above it that varies (`cat/train/x.jpg`). Without such
words all images form one pool with the first folder as the label, of which a keyed hash of the path puts `test_share` into `test`
and the rest into `train`. If every image lies in a folder called `images`, these folders are no labels. Hive folders are read as
what they say: `split=test/`, `label=cat/`, `class=cat/`.
Tars and tables: a word in the name of the file or of one of its folders is the split (`imagenet-train-0001.tar`). Without words
they form a pool: whole tars are held out (`choose_tars`), or rows of tables (`pool_split`).
What could be read in two ways is refused rather than guessed: a wrong split trains on the test images, and no score shows it.
Errors: DataError for such a layout, with an example of each word and the ways out."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from pipeline.data.sources.words import HIVE_LABEL, SplitName, is_image_folder, label_name, split_named, words_in
from pipeline.errors import DataError

_Item = TypeVar("_Item")
SplitFrom = Literal["path", "name", "column", "hash"]
"""What `data.split_from` may say: the folders, the file's own name, a column, or the keyed hash, whatever the names say."""
SplitOrigin = Literal["folders", "names", "column", "hash"]
"""What gave the images of a listing their splits."""
_SIDE_BY_SIDE = 8
"""A level with more folders than this holds classes: `bullet_train` and `test_tube` among a thousand of them are no splits."""
_NAMES_SHARE = 0.5
"""Share of the images whose own names hold a word, from which the names are taken to mean splits."""
_WAYS_OUT = "or set data.split_from: hash to ignore these words"


@dataclass(frozen=True)
class ImageLayout:
    """How the paths of a source of images are read."""

    origin: SplitOrigin
    split_depth: int | None
    """Index of the folder that names the split; None if no folder does."""
    label_depth: int
    """Index of the folder that is the label. An image that is not so deep has none."""
    classes: tuple[str, ...]
    """Label names, sorted; empty if no image is in a class folder."""
    image_folders: bool = False
    """Whether every image lies in a folder such as `images`, which is no label."""


@dataclass(frozen=True)
class _Words:
    """The splits that the parts of a path name."""

    folders: tuple[SplitName | None, ...]
    """Per folder, if the whole name is a word. Ends with the last word."""
    parts: tuple[frozenset[SplitName], ...]
    """Per folder, by the words in its name (`train2017`)."""
    name: frozenset[SplitName]
    """By the words in the file's own name."""


@dataclass
class FolderEvidence:
    """What the paths of a source's images say, in memory that does not grow with the number of images in a folder."""

    names: list[set[str]] = field(default_factory=list)
    """Distinct folder names by depth."""
    image_folders: bool = True
    """Whether every image so far lies in a folder such as `images`, whatever is above it."""
    _groups: dict[_Words, list[Any]] = field(default_factory=dict)
    """Which words occur together -> the first path with them, and the number of images."""
    _folder: str | None = None
    _words: _Words = _Words((), (), frozenset())
    _group: list[Any] = field(default_factory=list)
    """That of the last path; the next path mostly has the same words, and hashing them costs more than all else here."""

    def add(self, path: str) -> None:
        """Take in the path of one image."""
        folder, _, name = path.rpartition("/")
        named = words_in(name.rpartition(".")[0])
        if folder != self._folder:  # paths come in order, so a folder is looked at once
            parts = folder.split("/") if folder else []
            self.names += [set() for _ in range(len(parts) - len(self.names))]
            for names, part in zip(self.names, parts, strict=False):
                names.add(part)
            self.image_folders = self.image_folders and is_image_folder(folder)
            whole = _trimmed([split_named(part) for part in parts])
            self._folder = folder
            self._enter(_Words(whole, _trimmed([words_in(part) for part in parts]), named), path)
        elif named != self._words.name:
            self._enter(replace(self._words, name=named), path)
        self._group[1] += 1

    def _enter(self, words: _Words, path: str) -> None:
        self._words, self._group = words, self._groups.setdefault(words, [path, 0])

    def add_all(self, paths: Iterable[str]) -> "FolderEvidence":
        """Take in many paths, and return itself."""
        for path in paths:
            self.add(path)
        return self

    @property
    def patterns(self) -> list[tuple[_Words, str, int]]:
        """Words, an example and the number of images, in the order of the first example."""
        return [(words, path, images) for words, (path, images) in self._groups.items()]


def find_layout(
    evidence: FolderEvidence,
    split_from: SplitFrom | None = None,
    *,
    labels_given: bool = False,
    splits_given: bool = False,
) -> ImageLayout:
    """Return how the source's images are read. Raises DataError for a layout that can be read in two ways.

    `labels_given`, `splits_given`: a labels file gives them for every image, so that folders need not.
    """
    if splits_given or split_from == "hash":
        return _pool(evidence, "column" if splits_given else "hash")
    if split_from == "name":
        _check_every_name(evidence)
        return _pool(evidence, "names")
    loose = split_from == "path"
    depths = _split_depths(evidence, loose=loose)
    if depths:
        return _below_splits(evidence, depths, loose=loose, labels_given=labels_given)
    if loose:
        raise DataError(
            f"data.split_from=path: no level of folders names a split for every image, as {_unnamed(evidence, loose=True)} shows. "
            "Move every image into train/, val/ or test/, or set data.split_from: hash for a random split"
        )
    _refuse_half_named(evidence)
    return _pool(evidence, "hash")


def split_and_label(path: str, layout: ImageLayout, *, test_share: float, seed: int) -> tuple[str, str | None]:
    """Return split and label name of an image: by its names, or its split by a keyed hash of its path."""
    *folders, name = path.split("/")
    label = label_name(folders[layout.label_depth]) if len(folders) > layout.label_depth else None
    if layout.image_folders and label is not None and is_image_folder(label):
        label = None
    if layout.split_depth is not None:
        # exactly one: find_layout has refused the others
        (split,) = words_in(folders[layout.split_depth])
        return split, label
    if layout.origin == "names":
        (split,) = words_in(name.rpartition(".")[0])
        return split, label
    return pool_split(path, test_share=test_share, seed=seed), label


def named_splits(paths: Sequence[str], split_from: SplitFrom | None = None) -> list[str] | None:
    """Return the split of each tar or table by the words in its path, or None if no path names a split."""
    if split_from == "hash":
        return None
    found = [_words_of_file(path, split_from) for path in paths]
    for path, words in zip(paths, found, strict=True):
        if len(words) > 1:
            raise DataError(
                f"data.source: {path} names the splits {' and '.join(sorted(words))}. Rename the file or its folder, "
                "let one of them decide with data.split_from: path or data.split_from: name, "
                f"{_WAYS_OUT}"
            )
    if not any(found) and split_from is None:
        return None
    if not all(found):
        other = paths[found.index(frozenset())]
        named = next((path for path, words in zip(paths, found, strict=True) if words), None)
        contrast = f"{named} names its split and {other} does not" if named else f"{other} names no split"
        raise DataError(
            f"data.source: {contrast}. Put every file into train/, val/ or test/, or "
            f"begin every name with one of these words, or no name, {_WAYS_OUT}"
        )
    return [split for words in found for split in words]


def choose_tars(paths: Sequence[str], *, test_share: float, seed: int) -> list[str]:
    """Return the split of each tar of a pool: the `test_share` of them with the lowest keyed hash is `test`.

    Of several tars at least one is held out; a single tar is `train`.
    """
    count = max(1, round(test_share * len(paths))) if test_share and len(paths) > 1 else 0
    # by path among equal hashes, so that the choice is the same on any machine
    chosen = set(sorted(paths, key=lambda path: (keyed_hash(seed, path, purpose="split"), path))[:count])
    return ["test" if path in chosen else "train" for path in paths]


def pool_split(path: str, *, test_share: float, seed: int) -> str:
    """Return the split of one member of a pool."""
    # a threshold, not a count: the split of one file must not depend on which others there are
    return "test" if keyed_hash(seed, path, purpose="split") < test_share * 2.0**64 else "train"


def class_order(names: Collection[str]) -> tuple[str, ...]:
    """Return the classes in the order of their labels: by value if all are whole numbers, else by text."""
    # 07 is not a number here: it and 7 would be two classes of one value
    numbers = all(name.isdecimal() and str(int(name)) == name for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def keyed_hash(seed: int, path: str, *, purpose: Literal["split", "shard", "row_group"]) -> int:
    """Return 64 random bits that belong to this path, the same on every machine and at every retry."""
    # a hash rather than a shuffle: a file that is added later moves no other file to another split
    data = f"{purpose}:{seed}:{path}".encode()
    # blake2b: Python's own hash() differs between processes
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _pool(evidence: FolderEvidence, origin: SplitOrigin) -> ImageLayout:
    """The layout without split folders: the label is the first folder, or the Hive folder that says so."""
    label = next((depth for depth, names in enumerate(evidence.names) if all(map(HIVE_LABEL.fullmatch, names))), 0)
    return ImageLayout(origin, None, label, _classes(evidence, label), evidence.image_folders)


def _below_splits(evidence: FolderEvidence, depths: Sequence[int], *, loose: bool, labels_given: bool) -> ImageLayout:
    """The layout with a level of split folders. `depths`: the levels on which every image has a word."""
    for words, path, _ in evidence.patterns:
        splits = list(dict.fromkeys(_at(words, depth, loose=loose) for depth in depths))
        if len(splits) > 1:
            raise DataError(
                f"data.source: {path} is in a folder for {splits[0]} and in one for {splits[1]}, and every image is in two such "
                f"folders. Point data.source at one of the two levels, or give the splits in data.labels, {_WAYS_OUT}"
            )
    # of `train/train/cat`, as archives unpack, the lower one: what is above it says nothing else
    split, below = depths[-1], depths[-1] + 1
    above = [depth for depth in range(split) if depth not in depths and len(evidence.names[depth]) > 1]
    has_below = bool(_classes(evidence, below))
    if labels_given or not above:
        return ImageLayout("folders", split, below, _classes(evidence, below), evidence.image_folders)
    if has_below or len(above) > 1:
        two = [sorted(evidence.names[depth])[:2] for depth in (*above, *([below] if has_below else []))]
        raise DataError(
            "data.source: folders above and below the split folders could be the label "
            f"({'; '.join(' or '.join(names) for names in two)}, as in {evidence.patterns[0][1]}). Point data.source at a "
            "folder that holds one set of splits, or give the labels in data.labels"
        )
    return ImageLayout("folders", split, above[0], _classes(evidence, above[0]), evidence.image_folders)


def _classes(evidence: FolderEvidence, depth: int) -> tuple[str, ...]:
    # train/cat and test/cat are one class, so classes are united over the splits
    names = {label_name(name) for name in evidence.names[depth]} if depth < len(evidence.names) else set()
    return tuple(sorted(name for name in names if not (evidence.image_folders and is_image_folder(name))))


def _split_depths(evidence: FolderEvidence, *, loose: bool) -> list[int]:
    """The levels of folders on which every image has a word."""
    patterns = [words for words, _, _ in evidence.patterns]
    if not patterns:
        return []
    return [
        depth
        for depth in range(len(evidence.names))
        if all(_at(words, depth, loose=loose) is not None for words in patterns)
    ]


def _at(words: _Words, depth: int, *, loose: bool) -> SplitName | None:
    """The split that the folder at this depth names; in `loose` reading also by a single word in its name."""
    if depth < len(words.folders) and (whole := words.folders[depth]):
        return whole
    if loose and depth < len(words.parts) and len(words.parts[depth]) == 1:
        (split,) = words.parts[depth]
        return split
    return None


def _check_every_name(evidence: FolderEvidence) -> None:
    for words, path, _ in evidence.patterns:
        if len(words.name) != 1:
            found = f"names the splits {' and '.join(sorted(words.name))}" if words.name else "names no split"
            raise DataError(
                f"data.split_from=name: {path} {found}. Write one of train, val or test into the name of every file, or set "
                "data.split_from: path to go by the folders"
            )


def _refuse_half_named(evidence: FolderEvidence) -> None:
    """Raise DataError if words for splits occur, but not for every image on one level."""
    # reversed: the first example of each split is written last and stays
    if found := {split: path for words, path, _ in reversed(evidence.patterns) for split in words.folders if split}:
        ways = (
            "set data.split_from: path to go by them"
            if _split_depths(evidence, loose=True)
            else ("Move every image into train/, val/ or test/ on one level, take the others out of the source")
        )
        raise DataError(
            f"data.source: folders name the split of some images ({_listed(found)}) and not of others "
            f"({_unnamed(evidence, loose=False)}). {ways[0].upper()}{ways[1:]}, give the splits in data.labels, {_WAYS_OUT}"
        )
    for depth, names in enumerate(evidence.names):
        parts = {
            split: path
            for words, path, _ in reversed(evidence.patterns)
            if depth < len(words.parts)
            for split in words.parts[depth]
        }
        if len(parts) > 1 and len(names) <= _SIDE_BY_SIDE:
            raise DataError(
                f"data.source: the folders {', '.join(sorted(names))} may be splits ({_listed(parts)}) or classes. Set "
                f"data.split_from: path to read them as splits, rename them to train/, val/ and test/, {_WAYS_OUT}"
            )
    named = {split: path for words, path, _ in reversed(evidence.patterns) for split in words.name}
    counts = [(bool(words.name), count) for words, _, count in evidence.patterns]
    share = sum(count for has_word, count in counts if has_word) / max(1, sum(count for _, count in counts))
    if len(named) > 1 and share >= _NAMES_SHARE:
        raise DataError(
            f"data.source: the names of the images seem to name their splits ({_listed(named)}). Set "
            f"data.split_from: name to go by them, move the images into train/, val/ and test/, {_WAYS_OUT}"
        )


def _unnamed(evidence: FolderEvidence, *, loose: bool) -> str:
    """An image without a word on the level that most images have one on."""
    depths = range(len(evidence.names))

    def images_at(depth: int) -> int:
        return sum(count for words, _, count in evidence.patterns if _at(words, depth, loose=loose))

    best = max(depths, key=images_at, default=0)
    return next(path for words, path, _ in evidence.patterns if not _at(words, best, loose=loose))


def _listed(examples: Mapping[SplitName, str]) -> str:
    return ", ".join(f"{split}: {examples[split]}" for split in ("train", "val", "test") if split in examples)


def _words_of_file(path: str, split_from: SplitFrom | None) -> frozenset[SplitName]:
    """The splits that the path of a tar or table names."""
    *folders, name = path.split("/")
    parts = folders if split_from == "path" else [name.rpartition(".")[0]]
    if split_from is None:
        parts += folders
    return frozenset(split for part in parts for split in words_in(part))


def _trimmed(items: Sequence[_Item]) -> tuple[_Item, ...]:
    """Leave out what says nothing at the end, so that depth alone makes no new pattern."""
    end = len(items)
    while end and not items[end - 1]:
        end -= 1
    return tuple(items[:end])
