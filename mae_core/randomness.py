"""Counter-based randomness: what is drawn for a sample depends on its key alone, never on what was drawn before.

Key:    128 bits of blake2b over purpose and numbers (seed, epoch, sample id); it drives Philox-4x64.
Units:  uniforms in [0, 1); raw words are uint64.
Source: Salmon et al. 2011 (Philox). Only `random_raw` is used: numpy keeps bit generators' streams, and may change
what Generator's methods make of them. Golden tests hold every stream, since a changed one is another run."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Ids = Sequence[int] | npt.NDArray[np.int64]


def uniforms(seed: int, epoch: int, sample_id: int, purpose: str, count: int) -> npt.NDArray[np.float64]:
    """[count] uniforms of one sample; a longer draw begins with the shorter one."""
    row: npt.NDArray[np.float64] = uniform_rows(seed, (epoch,), (sample_id,), purpose, count)[0]
    return row


def uniform_rows(seed: int, epochs: Ids, sample_ids: Ids, purpose: str, count: int) -> npt.NDArray[np.float64]:
    """[B, count] uniforms, row by row what `uniforms` gives for that sample."""
    words = _words(_sample_keys(purpose, seed, epochs, sample_ids), count)
    return (words >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def mask_noise(seed: int, epochs: Ids, sample_ids: Ids, num_patches: int) -> npt.NDArray[np.float32]:
    """[B, L] noise that decides which patches stay visible.

    float32 from the top 24 bits, so exact and below 1; ties (one pair in 800 images of 196 patches) need a stable sort.
    """
    words = _words(_sample_keys("mask", seed, epochs, sample_ids), num_patches)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def permutation(count: int, purpose: str, *numbers: int) -> npt.NDArray[np.int64]:
    """[count] a permutation of 0..count-1: the stable order of raw words."""
    return np.argsort(_words([_key(purpose, *numbers)], count)[0], kind="stable")


def hash64(values: npt.NDArray[np.int64], key: int | Words) -> Words:
    """[n] well mixed 64-bit words, one a value; `key` is one number or one a value. Source: splitmix64 (Vigna)."""
    with np.errstate(over="ignore"):
        mixed = values.astype(np.uint64) + np.asarray(key, dtype=np.uint64)
        mixed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def key64(purpose: str, *numbers: int) -> int:
    """A 64-bit key for `hash64`."""
    return int(_key(purpose, *numbers)[0])


def _key(purpose: str, *numbers: int) -> Words:
    packed = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}q", *numbers)
    return np.frombuffer(hashlib.blake2b(packed, digest_size=16).digest(), dtype="<u8").astype(np.uint64)


def _sample_keys(purpose: str, seed: int, epochs: Ids, sample_ids: Ids) -> list[Words]:
    return [_key(purpose, seed, int(epoch), int(id_)) for epoch, id_ in zip(epochs, sample_ids, strict=True)]


def _words(keys: Sequence[Words], count: int) -> Words:
    """[len(keys), count] raw words. Setting the state costs 2 us a key where a new Philox, which asks the system for
    entropy first, costs 13."""
    words = np.empty((len(keys), count), np.uint64)
    philox = np.random.Philox(key=0)
    nothing = np.zeros(4, np.uint64)
    for row, key in zip(words, keys, strict=True):
        philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": nothing, "key": key},
            "buffer": nothing,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        row[:] = philox.random_raw(count)
    return words
