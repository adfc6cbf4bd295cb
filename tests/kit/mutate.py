"""A seeded hand that spoils bytes, JSON values and words."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

PIECES = (
    b"\xff",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"\x00",
    b"\xef\xbb\xbf",
    b",",
    b":",
    b"\\u",
    b"-",
    b"1e999",
    b"null",
    b"NaN",
    b"../",
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**70, -(2**70), 0.5, 1e308, -0.0),
    *("", "a", "null", "../../etc/passwd", "\x00", "\u202e", "a" * 5000, "os.system", "float32", "1"),
    *([], {}, [None], {"": None}, [[[[[]]]]], {"a": {"b": {"c": []}}}, [0] * 500),
)  # fmt: skip


def spoil_bytes(rng: random.Random, data: bytes, most: int = 3) -> bytes:
    """One to `most` changes: a byte, a cut, a piece put in, a part doubled or moved, the end lost."""
    result = bytearray(data)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(result)) if result else 0
        length = rng.choice((1, 2, 5, 20, 200))
        match rng.randrange(6):
            case 0 if result:
                result[place] ^= 1 << rng.randrange(8)
            case 1:
                del result[place : place + length]
            case 2:
                result[place:place] = rng.choice(PIECES)
            case 3:
                result[place:place] = result[place : place + length]
            case 4:
                part = result[place : place + length]
                del result[place : place + length]
                other = rng.randrange(len(result) + 1)
                result[other:other] = part
            case _:
                if rng.random() < 0.3:
                    del result[place:]
    return bytes(result)


def spoil_json(rng: random.Random, value: Any, most: int = 2) -> Any:
    """A copy with one to `most` changes at drawn places: another value, a key lost, renamed or new."""
    result = {"": copy.deepcopy(value)}
    for _ in range(rng.randint(1, most)):
        parent, key = rng.choice(list(_slots(result)))
        match rng.randrange(4) if isinstance(parent, dict) and key else 0:
            case 0:
                parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            case 1:
                del parent[key]
            case 2:
                parent[rng.choice(("x", key + "s", key.upper(), "../" + key))] = parent.pop(key)
            case _:
                parent[rng.choice(("surplus", "auto_map", "format", ""))] = copy.deepcopy(rng.choice(ODD_VALUES))
    return result[""]


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside, at any depth."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield value, key
        yield from _slots(item)
