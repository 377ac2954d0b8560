"""What single names of folders and files say: a split, a label, or nothing.

Words for splits: `train` or `training`; `val`, `valid`, `validation` or `dev`; `test` or `testing`, in any case."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

SplitName = Literal["train", "val", "test"]
WORDS: Mapping[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Word, in lower case -> split."""
_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img"})
_HIVE_SPLIT = re.compile(r"(?i)split=(.+)")
HIVE_LABEL = re.compile(r"(?i)(?:label|class)=(.+)")
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MAY_HOLD_A_WORD = re.compile(r"(?i)train|val|dev|test")


def split_named(text: str) -> SplitName | None:
    """Return the split that a whole folder name or a word in a column stands for, or None if it is unknown."""
    hive = _HIVE_SPLIT.fullmatch(text)
    return WORDS.get((hive[1] if hive else text).strip().lower())


def words_in(text: str) -> frozenset[SplitName]:
    """Return the splits that the words in a name stand for: `imagenet-train-0001`, `train2017`, `TestSet`."""
    return _words_in(text) if _MAY_HOLD_A_WORD.search(text) else frozenset()


@lru_cache(maxsize=4096)  # folder names come again and again
def _words_in(text: str) -> frozenset[SplitName]:
    if whole := split_named(text):
        return frozenset({whole})
    tokens = (token.lower() for token in _TOKEN.findall(text))
    return frozenset(WORDS[word] for token in tokens if (word := token.removesuffix("set")) in WORDS)


def label_name(folder: str) -> str:
    """Return the label that a folder stands for: its name, or the value in a Hive folder `label=cat`."""
    hive = HIVE_LABEL.fullmatch(folder) if "=" in folder else None
    return hive[1] if hive else folder


def is_image_folder(folder: str) -> bool:
    """Return whether the last name of the path is `images` or the like, which says what the files are and not what they show."""
    return folder.rpartition("/")[2].lower() in _IMAGE_FOLDERS
