"""Counter-based random numbers: what is drawn for a sample depends on its key alone, never on earlier draws.

A key is a 128-bit blake2b hash of a purpose ("mask", "augment", ...) and of integers such as seed, epoch and sample id. It
keys a Philox-4x64 generator. Any worker can therefore draw any sample's numbers in any order, and a resumed run draws what
an uninterrupted one would have drawn.

Only the generator's raw words are used. numpy guarantees the stream of a bit generator, but may change how the methods of
`Generator` turn it into numbers. Golden tests pin every stream, because a changed stream is a different run.

Shapes: B samples, L patches.

Units: uniforms are in [0, 1); raw words are uint64.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox)."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""Raw 64-bit words of a random stream."""
Ids = Sequence[int] | npt.NDArray[np.int64]
"""Epochs or sample ids, one per sample of a batch."""


def uniforms(seed: int, epoch: int, sample_id: int, purpose: str, count: int) -> npt.NDArray[np.float64]:
    """Draw `count` uniforms for one sample. A longer draw begins with the numbers of a shorter one.

    Shapes: float64 [count].
    """
    row: npt.NDArray[np.float64] = uniform_rows(seed, (epoch,), (sample_id,), purpose, count)[0]
    return row


def uniform_rows(seed: int, epochs: Ids, sample_ids: Ids, purpose: str, count: int) -> npt.NDArray[np.float64]:
    """Draw `count` uniforms for each sample of a batch; each row is what `uniforms` returns for that sample.

    Shapes: epochs [B], sample_ids [B] -> float64 [B, count].
    """
    words = _words(_sample_keys(purpose, seed, epochs, sample_ids), count)
    # the top 53 bits, which float64 holds exactly
    return (words >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def mask_noise(seed: int, epochs: Ids, sample_ids: Ids, num_patches: int) -> npt.NDArray[np.float32]:
    """Draw the noise that decides which patches of each sample stay visible (see `mask_patches`).

    Each number is made of the top 24 bits of a word, so it is exact in float32 and below 1. About one image of
    196 patches in 900 has two patches with equal noise, which is why masking sorts stably.

    Shapes: epochs [B], sample_ids [B] -> float32 [B, L] with L = num_patches.
    """
    words = _words(_sample_keys("mask", seed, epochs, sample_ids), num_patches)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def permutation(count: int, purpose: str, *numbers: int) -> npt.NDArray[np.int64]:
    """Return a random permutation of 0..count-1 for a purpose and some numbers: the stable order of `count` raw words.

    Shapes: int64 [count].
    """
    # sorting random words needs no numpy shuffle, whose algorithm may change; stable for the case of equal words
    return np.argsort(_words([_key(purpose, *numbers)], count)[0], kind="stable")


def hash64(values: npt.NDArray[np.int64], key: int | Words) -> Words:
    """Hash each value to a well-mixed 64-bit word with splitmix64; `key` selects one of 2**64 such hashes.

    `key` is a single number or one number per value; see `key64`. It is a cheap hash for bulk use, not a cryptographic one.

    Shapes: values int64 [n], key a number or uint64 [n] -> uint64 [n].

    Source: Vigna's splitmix64, after Steele et al. 2014.
    """
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64
        mixed = values.astype(np.uint64) + np.asarray(key, dtype=np.uint64)
        mixed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def key64(purpose: str, *numbers: int) -> int:
    """Return the 64-bit key of a purpose and some numbers, for `hash64`."""
    return int(_key(purpose, *numbers)[0])


def _key(purpose: str, *numbers: int) -> Words:
    # the zero byte separates purpose and numbers; "<" makes keys equal on machines of either byte order
    packed = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}q", *numbers)
    return np.frombuffer(hashlib.blake2b(packed, digest_size=16).digest(), dtype="<u8").astype(np.uint64)


def _sample_keys(purpose: str, seed: int, epochs: Ids, sample_ids: Ids) -> list[Words]:
    return [_key(purpose, seed, int(epoch), int(id_)) for epoch, id_ in zip(epochs, sample_ids, strict=True)]


def _words(keys: Sequence[Words], count: int) -> Words:
    """Return `count` raw words per key, [len(keys), count]."""
    words = np.empty((len(keys), count), np.uint64)
    # One generator is re-keyed for every row: setting its state takes 2 us, while constructing a Philox takes 13 us because
    # it asks the system for entropy first.
    philox = np.random.Philox(key=0)
    zeros = np.zeros(4, np.uint64)
    for row, key in zip(words, keys, strict=True):
        philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": zeros, "key": key},
            "buffer": zeros,
            "buffer_pos": 4,  # past the end of the buffer: the next word comes from the new key
            "has_uint32": 0,
            "uinteger": 0,
        }
        row[:] = philox.random_raw(count)
    return words
