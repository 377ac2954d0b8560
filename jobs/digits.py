"""scikit-learn's bundled handwritten digits, 1,797 of 8 x 8 pixels, as a tree of image files with three bad ones.

    FOLDER/train/3/0042.png    1,397 images (with held_out="val": 1,097)
    FOLDER/test/7/1700.png     400 images (with held_out="val": the 300 taken out of train, to choose settings on)

The split is fixed: a keyed permutation, cut at fixed places. Images are enlarged to 16 x 16 (bicubic) and stored as PNG."""

import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mae_core.randomness import permutation

SIDE = 16
TEST, VALIDATION = 400, 300
BAD = {
    "train/3/bad-empty.png": b"",
    "train/5/bad-truncated.png": None,
    "train/8/bad-text.jpg": b"this is not an image\n",
}
"""Files that must end up in quarantine: empty, truncated (None: half of a good file), and text with an image's name."""


def write_digits(folder: Path, *, held_out: Literal["test", "val"] = "test") -> Path:
    """Write the tree unless it exists, and return its folder. The finished folder appears by rename, so it is whole."""
    from sklearn.datasets import load_digits

    if folder.exists():
        return folder
    digits = load_digits()
    order = permutation(len(digits.target), "digits split", 0)
    test, validation, rest = np.split(order, [TEST, TEST + VALIDATION])
    parts = {"train": np.concatenate([validation, rest]), "test": test}
    if held_out == "val":
        parts = {"train": rest, "test": validation}
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-unfinished-", dir=folder.parent))
    for split, indices in parts.items():
        for index in indices:
            # scikit-learn's pixels go from 0 to 16
            pixels = np.round(digits.images[index] * 255 / 16).astype(np.uint8)
            path = unfinished / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    good = next((unfinished / "train" / "5").glob("*.png")).read_bytes()
    for name, content in BAD.items():
        (unfinished / name).write_bytes(good[: len(good) // 2] if content is None else content)
    unfinished.chmod(0o755)  # mkdtemp keeps it to this user
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(unfinished)  # another process was first, with the same files
    return folder
