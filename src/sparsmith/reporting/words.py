"""Numbers for people: narrow no-break spaces in large counts, three digits where three are known."""

from __future__ import annotations

from typing import Any

THIN = "\u202f"  # between thousands
UNIT = "\u00a0"  # before a unit
MINUS = "\u2212"


def count(value: float) -> str:
    """12 345 678."""
    return f"{round(value):,}".replace(",", THIN)


def short(value: float) -> str:
    """12.3 M, 7.81 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return (
                f"{value / limit:.3g}{UNIT}{unit}" if abs(value) < 1000 * limit else f"{value / limit:.0f}{UNIT}{unit}"
            )
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g}{UNIT}{unit}"
        value /= 1000
    return f"{value:.3g}{UNIT}TB"


def duration(seconds: float) -> str:
    """48 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g}{UNIT}s"
    if whole < 3600:
        return f"{whole // 60}{UNIT}min {whole % 60}{UNIT}s"
    return f"{whole // 3600}{UNIT}h {whole % 3600 // 60}{UNIT}min"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{UNIT}%"


def plain(value: Any) -> str:
    """A figure of unknown kind, as short as it can be said."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        if value == 0:
            return "0"
        return f"{value:.3g}".replace("-", MINUS) if 1e-3 <= abs(value) < 1e5 else f"{value:.2e}".replace("-", MINUS)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    return "none" if value is None else str(value)


def signed(value: float, digits: int) -> str:
    """+0.123, −0.123 or 0.000."""
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text[1:] if not float(text[1:]) else text
