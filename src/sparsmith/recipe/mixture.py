"""`data.mixture`: an instruction mixture in two levels, as FLAN writes them.

A sub-mixture has a share of the stream (its rate over the sum of the rates), and inside it a task weighs min(cap, rows). Each row becomes a
question and an answer through one of its task's templates, with or without the options shown, with or without worked examples before it.

Paper: FLAN-MoE (arXiv 2305.14705) for the four sub-mixtures; the Flan collection (arXiv 2301.13688) for the variants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sparsmith.errors import nearest
from sparsmith.recipe.sources import Name, NonNegativeFloat, PositiveInt, Source, Text
from sparsmith.recipe.strict import Clash, StrictModel
from sparsmith.recipe.templates import FIELD, RESERVED

OptionStyle = Literal["random", "dashes", "stars", "letters", "letters_dot", "letters_text", "numbers", "numbers_text"]


class Variants(StrictModel):
    """How often a row is shown in each of the four ways; relative weights, absent = 0."""

    zs_opt: NonNegativeFloat = 0.0
    """No worked example, options shown."""
    zs_noopt: NonNegativeFloat = 0.0
    """No worked example, options hidden."""
    fs_opt: NonNegativeFloat = 0.0
    """Worked examples first, options shown."""
    fs_noopt: NonNegativeFloat = 0.0
    """Worked examples first, options hidden."""

    @property
    def rates(self) -> dict[str, float]:
        """Each variant's share; they sum to 1."""
        total = self.zs_opt + self.zs_noopt + self.fs_opt + self.fs_noopt
        return {name: getattr(self, name) / total for name in VARIANTS}

    def clashes(self) -> Iterable[Clash]:
        if not any(getattr(self, name) for name in VARIANTS):
            yield Clash("zs_opt", "rates that sum to 0", "at least one above 0", f"Known: {', '.join(VARIANTS)}.")


VARIANTS = ("zs_opt", "zs_noopt", "fs_opt", "fs_noopt")
EVEN = Variants(zs_opt=0.25, zs_noopt=0.25, fs_opt=0.25, fs_noopt=0.25)
OPTIONS_SHOWN = Variants(zs_opt=0.5, fs_opt=0.5)


@dataclass(frozen=True, kw_only=True)
class PaperSubmixture:
    """A sub-mixture as it was published."""

    tasks: int | None
    """How many tasks it has; None where it is not told."""
    cap: int
    """Rows per task that count for the weight."""
    rates: dict[str, float]
    """Preset -> rate, in percent."""
    variants: Variants = EVEN


PAPER = {
    "muffin": PaperSubmixture(
        tasks=80, cap=30_000, rates={"flan2022": 46.0, "flan2022-a": 52.0, "flan2022-public": 40.0}
    ),
    "t0-sf": PaperSubmixture(
        tasks=193, cap=20_000, rates={"flan2022": 27.9, "flan2022-a": 15.0, "flan2022-public": 32.0}
    ),
    "niv2": PaperSubmixture(
        tasks=1554,
        cap=5_000,
        rates={"flan2022": 24.2, "flan2022-a": 30.0, "flan2022-public": 20.0},
        variants=OPTIONS_SHOWN,
    ),
    "cot": PaperSubmixture(
        tasks=9,
        cap=100_000,
        rates={"flan2022": 1.8, "flan2022-a": 3.0, "flan2022-public": 5.0},
        variants=OPTIONS_SHOWN,
    ),
    "dialog": PaperSubmixture(tasks=None, cap=200_000, rates={"flan2022-public": 3.0}, variants=OPTIONS_SHOWN),
}
"""The published sub-mixtures. `flan2022` has the rates of the published run, `flan2022-a` the other ones that are told of it,
`flan2022-public` those of the public collection, which adds dialogs. Which of them FLAN-MoE used is not told."""
ALIASES = {"flan2021": "muffin"}


def paper_submixture(name: str) -> PaperSubmixture | None:
    """The published sub-mixture of that name, upper case or not."""
    lowered = name.lower()
    return PAPER.get(ALIASES.get(lowered, lowered))


class TaskSource(Source):
    """A task: a source whose rows are rendered by templates."""

    domain: Name | None = None  # type: ignore[assignment]
    """The group by which losses and expert load are told apart; absent = the sub-mixture's name."""
    columns: dict[str, str] = {}
    """A template's field (`question`, `answer`, ...) -> a column, or a text such as `"{question} {context}"`; a field that is not named
    is the column of its name. With a `format`, our fields (`prompt`, `completion`, ...) as in `train`."""
    templates: Text
    """A set that ships with sparsmith (docs/mixtures.md lists them), or a YAML or JSON file of patterns, relative to the recipe's
    folder."""
    options: str | tuple[str, ...] | None = None
    """The column that holds the options (a list, or a text that carries them), or the fixed options; the field `answer` is one of them
    (or its index, or letter). Templates show them at `{options_}`."""
    option_style: OptionStyle = "random"
    """How options are marked; `random` draws one for each row. Choose `letters` where a text of the row speaks of `(B)`."""
    variants: Variants | None = None
    """Absent = the sub-mixture's. A task whose question needs its options takes `{zs_opt: 1, fs_opt: 1}`."""
    fixed: dict[str, Text] = {}
    """Fields that are the same for every row, such as a task's definition."""

    def clashes(self) -> Iterable[Clash]:
        yield from super().clashes()
        if self.options is None:
            yield from self.without_effect(["option_style"], "`options`")
        elif not isinstance(self.options, str) and len(set(self.options)) < max(2, len(self.options)):
            yield Clash("options", "fewer than two different options", "at least two, each once", "Mend the list.")
        if self.format == "text":
            yield Clash("format", "`text`", "a format with a question and an answer", "Remove `format`.")
        if self.part != "all" and self.format == "auto" and "prompt" not in self.columns:
            expected = "`prompt`, the text by which the sides are drawn, as the evaluation source reads it"
            yield Clash("columns", "no `prompt`", expected, "Add `prompt` to `columns`.")
        for field in self.fixed:
            if field in self.columns:
                yield Clash(f"fixed.{field}", "a field that `columns` has too", "one of the two", "Remove one.")
            if not FIELD.fullmatch(field) or field in RESERVED:
                yield Clash(f"fixed.{field}", f"the name `{field}`", "a field of a template", "Rename it.")

    def _column_clashes(self) -> Iterable[Clash]:
        if self.format != "auto":
            yield from super()._column_clashes()
            return
        for field in self.columns:
            if not FIELD.fullmatch(field) or field in RESERVED:
                expected = "letters, digits and _, a letter first and no _ last"
                yield Clash(f"columns.{field}", f"the name `{field}`", expected, "Rename the field.")


class SubMixture(StrictModel):
    """Tasks that share a rate."""

    name: Name
    rate: NonNegativeFloat | None = None
    """Weight against the other sub-mixtures, of any scale; absent = the preset's."""
    cap: PositiveInt | None = None
    """At most this many rows of a task count for its weight; absent = the preset's, else all."""
    variants: Variants | None = None
    """Absent = the mixture's; else, by the published name, 0.5 zs_opt and 0.5 fs_opt for `cot`, `niv2` and `dialog`; else 0.25 each."""
    tasks: Annotated[tuple[TaskSource, ...], Field(min_length=1)]

    def clashes(self) -> Iterable[Clash]:
        if self.rate == 0:
            found = f"the rate 0 of `{self.name}`, of which nothing would be trained on"
            yield Clash("rate", found, "a number above 0", "Raise it, or remove the sub-mixture.")


class MixtureSettings(StrictModel):
    """An instruction mixture in two levels."""

    preset: Literal["flan2022", "flan2022-a", "flan2022-public"] | None = None
    """Fills in `rate` and `cap` of sub-mixtures named `muffin` (or `flan2021`), `t0-sf`, `niv2`, `cot` and, `flan2022-public` only,
    `dialog`, as they were published."""
    submixtures: Annotated[tuple[SubMixture, ...], Field(min_length=1)]
    variants: Variants | None = None
    """For sub-mixtures without their own."""
    fewshot_max: PositiveInt = 5
    """Most worked examples; their number is drawn from 1 to this."""
    max_input: Annotated[int, Field(ge=16)] = 2048
    """Tokens of a row's input. Worked examples are left out, the last first, until the input is at most 15/16 of it (from 2048 on: 128
    tokens less), and the whole row at most `data.max_length`. A longer input is treated by `data.over_long`."""
    max_target: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row's answer, its eos included. A longer one is treated by `data.over_long`."""

    @property
    def tasks(self) -> tuple[TaskSource, ...]:
        """All tasks in their order, each with its domain."""
        return tuple(
            task if task.domain else task.model_copy(update={"domain": sub.name})
            for sub in self.submixtures
            for task in sub.tasks
        )

    @property
    def input_limit(self) -> int:
        """Tokens that the input may have while worked examples stand in it."""
        return self.max_input - min(128, self.max_input // 16)

    def rate_of(self, sub: SubMixture) -> float:
        """The sub-mixture's rate, the preset's where it has none."""
        published = paper_submixture(sub.name)
        if sub.rate is None and published is not None and self.preset is not None:
            return published.rates.get(self.preset, 0.0)
        return sub.rate or 0.0

    def cap_of(self, sub: SubMixture) -> int | None:
        """The sub-mixture's cap, the preset's where it has none."""
        published = paper_submixture(sub.name) if self.preset else None
        return sub.cap or (published.cap if published else None)

    def variants_of(self, task: str) -> Variants:
        """The variants of the task of that name."""
        sub, found = next((sub, one) for sub in self.submixtures for one in sub.tasks if one.name == task)
        published = paper_submixture(sub.name)
        return found.variants or sub.variants or self.variants or (published.variants if published else EVEN)

    def clashes(self) -> Iterable[Clash]:
        yield from self._rate_clashes()
        names = [sub.name for sub in self.submixtures]
        for index, name in enumerate(names):
            if name in names[:index]:
                found = f"`{name}` a second time"
                yield Clash(f"submixtures.{index}.name", found, "a name of its own", "Rename it.")
        every = [self.variants_of(task.name) for task in self.tasks]
        yield from self._idle_variants()
        if not any(one.fs_opt or one.fs_noopt for one in every):
            yield from self.without_effect(["fewshot_max"], "a variant with worked examples")

    def _idle_variants(self) -> Iterable[Clash]:
        """Variants that every task below has for itself."""
        needing = [sub for sub in self.submixtures if not all(task.variants for task in sub.tasks)]
        found, mend = "`variants`, which has no effect here", "Remove `variants`."
        if self.variants and all(sub.variants for sub in needing):
            yield Clash("variants", found, "a sub-mixture without its own", mend)
        for index, sub in enumerate(self.submixtures):
            if sub.variants and sub not in needing:
                yield Clash(f"submixtures.{index}.variants", found, "a task without its own", mend)

    def _rate_clashes(self) -> Iterable[Clash]:
        known = [name for name, one in PAPER.items() if self.preset in one.rates]
        for index, sub in enumerate(self.submixtures):
            if sub.rate is None and not self.rate_of(sub):
                key = f"submixtures.{index}.rate"
                if self.preset is None:
                    yield Clash(key, f"no rate of `{sub.name}`", "a number above 0", "Add `rate`, or a `preset`.")
                else:
                    expected = f"a rate, or a name of the preset {self.preset}"
                    yield Clash(key, f"no rate of `{sub.name}`", expected, nearest(sub.name, known))
        taken = [sub for sub in self.submixtures if paper_submixture(sub.name) and None in (sub.rate, sub.cap)]
        if self.preset and not taken:
            found = f"`{self.preset}`, which has no effect here"
            unless = "a sub-mixture of a published name without `rate` or `cap`"
            yield Clash("preset", found, unless, f"Remove `preset`. {nearest('', known)}")
