"""One seed, many named streams of random numbers.

A stream's seed depends on the run's seed and the stream's name alone, so that extra evaluation, logging or another method never
shifts the numbers of anybody else. Streams are saved as plain ints.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


def stream_seed(seed: int, name: str, *indices: int) -> int:
    """A 63-bit seed for the stream `name` (and, say, a layer or step index), from the run's `seed`."""
    text = ":".join([str(seed), name, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_generator(seed: int, name: str, *indices: int, device: str = "cpu") -> torch.Generator:
    """A torch generator at the start of the stream."""
    import torch

    return torch.Generator(device=device).manual_seed(stream_seed(seed, name, *indices))


def numpy_generator(seed: int, name: str, *indices: int) -> numpy.random.Generator:
    """A numpy generator at the start of the stream."""
    import numpy

    return numpy.random.Generator(numpy.random.PCG64(stream_seed(seed, name, *indices)))
