"""Measured milliseconds per token by depth, kept beside the model: `soft_profile.json`.

    {"format_version": 1, "profiles": [
        {"device": "AMD EPYC", "dtype": "float32", "batch": 1, "context": 64, "threads": 2, "ms_per_token": {"2": 1.3, "6": 3.1}}]}

One row per device, number type and batch size; a new measurement takes the old one's place.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from sparsmith import durable
from sparsmith.errors import CheckpointError
from sparsmith.inference.faults import ProfileMissing
from sparsmith.manifests import refuse_newer

FILE = "soft_profile.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Profile:
    """What one machine needs per token."""

    device: str
    dtype: str
    batch: int
    ms_per_token: dict[int, float]
    """Depth in blocks -> milliseconds per step of the batch."""
    context: int = 0
    """Tokens of the prompt it was measured behind."""
    threads: int = 0
    """CPU threads; 0 on a GPU."""
    spread: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Depth -> (first, third) quartile in milliseconds."""

    def fits(self, device: str, dtype: str, batch: int) -> bool:
        return (self.device, self.dtype, self.batch) == (device, dtype, batch)


def device_name(model: nn.Module) -> str:
    """The device that the model lies on, as a profile names it."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def dtype_of(model: nn.Module) -> str:
    return str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")


def write_profile(profile: Profile, target: str | Path) -> Path:
    """Into a file, or `soft_profile.json` of a folder, in the place of an older one of the same device, number type and batch."""
    file = _file_of(target)
    known = _read(file) if file.is_file() else []
    kept = [row for row in known if not row.fits(profile.device, profile.dtype, profile.batch)]
    durable.write_json(file, {"format_version": FORMAT_VERSION, "profiles": [asdict(row) for row in [*kept, profile]]})
    return file


def find_profile(source: Profile | str | Path | None, model: nn.Module, batch: int) -> Profile:
    """The profile that holds here.

    Raises:
        ProfileMissing: none is given, or none fits.
    """
    device, dtype = device_name(model), dtype_of(model)
    wanted = f"a profile of {device}, {dtype}, batch {batch}"
    mend = "Measure one on this machine with `sparsmith bench`, or ask for a share of the cost as 0.5."
    if source is None:
        raise ProfileMissing("budget in milliseconds", "no profile", wanted, mend)
    file = None if isinstance(source, Profile) else _file_of(source)
    if file is not None and not file.is_file():
        raise ProfileMissing(str(file), "no such file", wanted, mend)
    rows = [source] if isinstance(source, Profile) else _read(_file_of(source))
    for row in rows:
        if row.fits(device, dtype, batch):
            return row
    found = "; ".join(f"{row.device}, {row.dtype}, batch {row.batch}" for row in rows) or "none"
    raise ProfileMissing(str(file or "profile"), found, wanted, mend)


def _file_of(target: str | Path) -> Path:
    return Path(target) / FILE if Path(target).is_dir() else Path(target)


def _read(file: Path) -> list[Profile]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        refuse_newer(str(file), data.get("format_version"), FORMAT_VERSION)
        return [
            Profile(
                **{
                    **row,
                    "ms_per_token": {int(n): float(ms) for n, ms in row["ms_per_token"].items()},
                    "spread": {int(n): tuple(pair) for n, pair in row.get("spread", {}).items()},
                }
            )
            for row in data["profiles"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise CheckpointError(
            str(file), f"no readable profile ({fault})", "what `sparsmith bench` writes", "Measure it anew."
        ) from fault
