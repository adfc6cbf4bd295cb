"""`sparsmith doctor`: the machine, what is free on it, and every package that sparsmith asks for: there, missing, too old, or broken."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from sparsmith.app.facts import machine, versions

_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")
_WHAT_FOR = {
    "quant": "a base in 4 bits (model.quant: nf4)",
    "eval": "lm-evaluation-harness tasks",
    "track": "trackio as tracker",
    "serve": "the server",
}
"""Extras that a user may want; those of developers are not looked at."""


@dataclass(frozen=True)
class Package:
    """One requirement and how it stands."""

    name: str
    wanted: str
    found: str | None
    extra: str | None
    """The extra that asks for it; None for what sparsmith cannot be without."""
    fault: str = ""
    """Empty where it is usable here."""


@dataclass(frozen=True)
class Checkup:
    """What `doctor` found."""

    machine: dict[str, Any]
    versions: dict[str, str]
    free: dict[str, Any]
    """Bytes free: `memory`, `disk` in the working folder, `cache` where tokens are kept; `gpus`, a list."""
    packages: tuple[Package, ...]
    missing: tuple[str, ...] = field(default=())
    """What is missing, with the command that mends it."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        facts = {
            key: ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            for key, value in self.machine.items()
        }
        free = {f"free {key}": _gib(value) for key, value in self.free.items()}
        lines = [f"{key}: {value}" for key, value in {**self.versions, **facts, **free}.items() if value is not None]
        states = [f"{row.name} (extra {row.extra}): {row.fault or 'works'}" for row in self.packages if row.extra]
        return "\n".join([*lines, *states, *(f"missing: {each}" for each in self.missing or ("nothing",))])

    def __rich__(self) -> str:
        from rich.markup import escape

        return escape(str(self))


def doctor() -> Checkup:
    """Look at the machine and at every package, required or optional."""
    from sparsmith import __version__

    packages = tuple(_packages())
    missing = tuple(_mend(row) for row in packages if row.fault)
    usable = all(not row.fault for row in packages if row.name == "torch")
    facts, free = (machine(), _free()) if usable else ({}, {})  # both ask torch
    return Checkup(facts, {"sparsmith": __version__, **versions()}, free, packages, missing)


def _packages() -> list[Package]:
    from packaging.requirements import Requirement

    rows = []
    for text in requires("sparsmith") or ():
        need, extra = Requirement(text), _EXTRA.search(text)
        group = extra.group(1) if extra else None
        if group is not None and group not in _WHAT_FOR:
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            rows.append(Package(need.name, str(need.specifier), None, group, "not installed"))
            continue
        fits = need.specifier.contains(found, prereleases=True)
        fault = "" if fits else f"{found} is installed, {need.specifier} is needed"
        if fits and need.name == "bitsandbytes":
            fault = _try_four_bits()
        rows.append(Package(need.name, str(need.specifier), found, group, fault))
    return rows


def _try_four_bits() -> str:
    """Quantise and restore a small tensor, on the GPU where there is one; empty where that works."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        again = functional.dequantize_4bit(packed, state)
        return "" if torch.isfinite(again).all() else f"4-bit numbers on {device} come back as none"
    except Exception as fault:  # a build for another CUDA raises almost anything
        return f"does not work on {device} ({' '.join(str(fault).split())[:200]})"


def _mend(row: Package) -> str:
    if row.extra is None:
        return f"{row.name}: {row.fault}; run: pip install '{row.name}{row.wanted}'"
    return f"{row.name}: {row.fault}; for {_WHAT_FOR[row.extra]} run: pip install 'sparsmith[{row.extra}]'"


def _free() -> dict[str, Any]:
    import torch

    from sparsmith.data.cache import default_dir
    from sparsmith.durable import free_bytes
    from sparsmith.training.out_of_memory import free_bytes as free_memory

    gpus = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    return {
        "memory": free_memory(torch.device("cpu")),
        "disk": free_bytes(Path.cwd()),
        "cache": free_bytes(default_dir()),
        "gpus": gpus,
    }


def _gib(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(f"{each / 2**30:.1f} GiB" for each in value) or None
    return f"{value / 2**30:.1f} GiB"
