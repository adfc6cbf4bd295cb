"""Which data sets a source holds, told by its tag or its name: what a run trained on, as far as evaluation must know.

A tag is a family (`gsm8k`) or a bundle of them (`flan2022`, `p3`, `niv2`: all families of that mixture). Names that no table knows are
compared as they are, without the words of a split: `sums` and `sums_test` are the same task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from sparsmith.data.family_table import (
    ALIASES,
    BUNDLE_ALIASES,
    BUNDLES,
    MMLU_IN_NIV2,
    SPLIT_WORDS,
    SUBMIXTURES,
)
from sparsmith.errors import UsageError, nearest
from sparsmith.recipe.schema import DataSettings, Source

_NIV2_NUMBER = re.compile(r"(?:^|[^A-Za-z0-9])task(\d+)(?!\d)", re.IGNORECASE)


def families_of_preset(preset: str) -> dict[str, tuple[str, ...]]:
    """Family -> the parts of the mixture that it stands in (`cot`, `muffin`, `t0`, `niv2`).

    Raises:
        UsageError: no mixture of that name.
    """
    if preset not in BUNDLES:
        raise UsageError("preset", f"`{preset}`", "a mixture whose families are known", nearest(preset, list(BUNDLES)))
    found: dict[str, tuple[str, ...]] = {}
    for part in BUNDLES[preset]:
        for family in SUBMIXTURES[part]:
            found[family] = (*found.get(family, ()), part)
    return found


def family_of(name: str) -> str | None:
    """The family, or the bundle, that a source's name tells of; the longest known name in it wins. None where none is known."""
    words = _words(name)
    runs = {"".join(words[i:j]): j - i for i in range(len(words)) for j in range(i + 1, min(len(words), i + 5) + 1)}
    known = [run for run in runs if run in _known()]
    return _known()[max(known, key=len)] if known else None


def tag_of(source: Source) -> str:
    """The source's own `family`; else that of its name; else the name without the words of a split."""
    if source.family is not None:
        return _known().get("".join(_words(source.family)), source.family)
    found = family_of(source.name)
    if found is not None:
        return found
    words = _words(source.name)
    return "_".join([word for word in words if word not in SPLIT_WORDS] or words)


def families_of(source: Source) -> dict[str, str]:
    """Family -> in which words the source has it: `gsm8k` by itself, or `arc (in p3)` for one of a bundle. The tag stands first."""
    tag = tag_of(source)
    inside = families_of_preset(tag) if tag in BUNDLES else {}
    return {tag: tag, **{family: f"{family} (in {tag})" for family in inside}}


def training_sources(settings: DataSettings) -> tuple[Source, ...]:
    """Every source that the settings train on; one whose rate is 0 is never drawn from."""
    return tuple(source for source in settings.sources if getattr(source, "rate", 1.0) > 0)


def shared_families(source: Source, trained: Iterable[Source], presets: Sequence[str] = ()) -> dict[str, list[str]]:
    """What a source has in common with what is trained on: reason -> names of the training sources (or presets).

    Args:
        source: of evaluation.
        trained: the training sources.
        presets: names of whole mixtures that are trained on besides.
    """
    found: dict[str, list[str]] = {}
    ours = families_of(source)
    for other in trained:
        if other.path == source.path:
            found.setdefault("same file", []).append(other.name)
        same = tag_of(other) == tag_of(source)
        for family, told in families_of(other).items():
            if family in ours and (family == tag_of(source) or not same):
                found.setdefault(f"family {told}", []).append(other.name)
    for preset in presets:
        for family, parts in families_of_preset(preset).items():
            if family in ours or tag_of(source) == preset:
                found.setdefault(f"family {family} (in {', '.join(parts)})", []).append(preset)
    return found


def without_mmlu(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """(tasks that stay, tasks that hold MMLU) of a list of NIv2 task names, each in their order. A plain download has 57 of the latter."""
    held = [task for task in tasks if _holds_mmlu(task)]
    dropped = set(held)
    return [task for task in tasks if task not in dropped], held


def _holds_mmlu(task: str) -> bool:
    number = _NIV2_NUMBER.search(task)
    return bool(number and int(number.group(1)) in MMLU_IN_NIV2)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower())


@cache
def _known() -> Mapping[str, str]:
    """Letters and digits of a known name -> family or bundle."""
    table = {**ALIASES, **BUNDLE_ALIASES}
    return {"".join(_words(alias)): family for family, aliases in table.items() for alias in aliases} | {
        "".join(_words(family)): family for family in (*ALIASES, *(name for name in BUNDLES if name != "cot"))
    }
