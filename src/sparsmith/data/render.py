"""A mixture's rows -> questions and answers: variant, template, worked examples and style of options are drawn for each row.

Every draw of a row comes from a stream of its own, named by the run's seed, the task and the row's own text. So a row reads the same in
every run of one seed, whatever the number of workers, the order or a resume; only the worked examples also depend on which rows the task
has.

Worked examples are rows of the same task's training rows, never the row itself nor one that asks the same. They are left out, the last
first, until the input fits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparsmith.data.choices import HEADS, Choices, Style, styles_for
from sparsmith.data.fields import ANSWER, TaskFields, TaskRow
from sparsmith.data.messages import Messages
from sparsmith.data.rows import Reject, RowFault, reject
from sparsmith.data.sources import Example
from sparsmith.data.tokens import TokenRow
from sparsmith.data.workers import encode_all
from sparsmith.errors import DataError
from sparsmith.recipe.mixture import VARIANTS, MixtureSettings, TaskSource
from sparsmith.recipe.templates import OPTIONS, Piece, Template, TemplateSet, load_templates
from sparsmith.seeds import numpy_generator

RENDER_VERSION = 1
"""Raised whenever rendering gives other texts, so that no old cache is believed."""


@dataclass(frozen=True)
class Draw:
    """How a row is shown."""

    template: Template
    shows_options: bool
    shots: tuple[int, ...] = ()
    """Numbers of the rows that are worked examples, in their order."""
    style: Style | None = None
    head: str = ""

    @property
    def variant(self) -> str:
        return ("fs" if self.shots else "zs") + ("_opt" if self.shows_options else "_noopt")


@dataclass(frozen=True)
class Rendering:
    """How the rows of one task are rendered."""

    task: TaskSource
    templates: TemplateSet
    rates: dict[str, float]
    """Variant -> share."""
    fewshot_max: int
    input_limit: int
    """Tokens of an input with worked examples."""
    max_length: int
    """Tokens of a row with worked examples."""
    seed: int

    @classmethod
    def of(cls, mixture: MixtureSettings, task: TaskSource, base_dir: Path, max_length: int, seed: int) -> Rendering:
        """That of a task of a recipe.

        Raises:
            RecipeErrors: its templates cannot be read. DataError: they show no options, and the task has some.
        """
        found = load_templates(task.templates, base_dir)
        rates = mixture.variants_of(task.name).rates
        if task.options is not None and (rates["zs_opt"] or rates["fs_opt"]) and not found.shows_options:
            raise DataError(
                f"task `{task.name}`",
                f"options, and templates `{found.name}` that show none",
                "a template with `{options_}`",
                "Choose other templates, or remove `options`.",
            )
        return cls(task, found, rates, mixture.fewshot_max, mixture.input_limit, max_length, seed)

    @property
    def key(self) -> list[Any]:
        """All that decides the rendered text beside the rows and the task's settings."""
        numbers = [self.fewshot_max, self.input_limit, self.max_length, self.seed]
        return [RENDER_VERSION, self.templates.digest, self.rates, *numbers]

    def fields(self) -> TaskFields:
        """The reader of the task's rows."""
        return TaskFields(self.task, self.templates.fields)

    @cached_property
    def with_options(self) -> tuple[Template, ...]:
        return tuple(one for one in self.templates.templates if one.shows_options)

    def draw(self, number: int, rows: Sequence[TaskRow]) -> Draw:
        """How row `number` of the task's rows is shown."""
        row = rows[number]
        stream = numpy_generator(self.seed, f"data.render.{self.task.name}", row.identity)
        point, which, head = stream.random(3)
        bounds = np.cumsum([self.rates[name] for name in VARIANTS])
        bounds /= bounds[-1]
        variant = VARIANTS[int(np.searchsorted(bounds, point, side="right"))]
        shows = row.choices is not None and variant.endswith("_opt")
        pool = self.with_options if shows else self.templates.templates
        template = pool[int(which * len(pool))]
        count = int(stream.integers(1, self.fewshot_max + 1))
        style_at = stream.random()
        shots = self._shots(number, rows, template, count, stream) if variant.startswith("fs") else ()
        if not shows:
            return Draw(template, False, shots)
        shown = max(len(one.choices.texts) for one in (rows[each] for each in (number, *shots)) if one.choices)
        styles = styles_for(self.task.option_style, shown)
        if not styles:
            style = self.task.option_style
            raise RowFault(f"{shown} options", f"as many as `{style}` can mark", "Change `option_style`.", "options")
        return Draw(template, True, shots, styles[int(style_at * len(styles))], HEADS[int(head * len(HEADS))])

    def _shots(
        self, number: int, rows: Sequence[TaskRow], template: Template, count: int, stream: np.random.Generator
    ) -> tuple[int, ...]:
        """Up to `count` other rows, each asking something of its own."""
        total = len(rows)
        order = stream.permutation(total) if total <= 64 else stream.integers(0, total, 8 * count + 32)
        asked, chosen = {_asks(rows[number], template)}, []
        for other in order.tolist():
            question = _asks(rows[other], template)
            if other != number and question not in asked:
                asked.add(question)
                chosen.append(other)
            if len(chosen) == count:
                break
        return tuple(chosen)

    def messages(self, draw: Draw, row: TaskRow, rows: Sequence[TaskRow]) -> Messages:
        """The row as a conversation of one question and one answer."""
        template = draw.template
        parts = [_fill(template.lead, row.fields)] if template.lead else []
        for shot in draw.shots:
            question, answer = self.pair(draw, rows[shot])
            parts.append(question + template.join + answer)
        question, answer = self.pair(draw, row)
        talk = [
            {"role": "user", "content": template.between.join([*parts, question])},
            {"role": "assistant", "content": answer},
        ]
        return [{"role": "system", "content": row.system}, *talk] if row.system else talk

    def pair(self, draw: Draw, row: TaskRow) -> tuple[str, str]:
        """Question and answer of a row, or of a worked example, in the drawn way."""
        fields = dict(row.fields)
        block = ""
        if draw.shows_options:
            choices, style = row.choices, draw.style
            assert isinstance(choices, Choices) and style is not None
            block = style.block(draw.head, choices.texts)
            fields[ANSWER] = style.answer(choices.right, choices.texts[choices.right])
        return _fill(draw.template.input, fields, block), _fill(draw.template.target, fields)


def _asks(row: TaskRow, template: Template) -> tuple[str, ...]:
    """What a row asks, without regard to upper case and spaces."""
    texts = [row.fields[name] for name in template.asked if name in row.fields]
    return tuple(" ".join(text.casefold().split()) for text in texts)


def _fill(pieces: tuple[Piece, ...], fields: Mapping[str, str], block: str = "") -> str:
    """The pattern with its fields put in. Without options the blank space before their place goes too, at the head that behind it."""
    made, eat = "", False
    for literal, name in pieces:
        made += literal.lstrip() if eat else literal
        eat = False
        if name == OPTIONS and not block:
            made = made.rstrip()
            eat = not made
        elif name is not None:
            made += block if name == OPTIONS else fields[name]
    return made


def encode_task(
    rendering: Rendering, examples: list[Example], rejects: list[Reject], encoder: Any, workers: int, stop: bool
) -> tuple[list[tuple[Example, TokenRow]], dict[str, Any]]:
    """Render and encode a task's rows.

    Returns:
        (example, tokens) of each good row, and what was drawn: rows by `variants`, worked `shots` kept, `shots_pruned`.
    """
    rows = _rows_of(examples)
    plans: dict[int, Draw] = {}
    done: dict[int, TokenRow | RowFault] = {}
    for number in range(len(rows)):
        try:
            plans[number] = rendering.draw(number, rows)
        except RowFault as fault:
            done[number] = fault
    pruned, pending = 0, list(plans)
    while pending:
        texts = [rendering.messages(plans[one], rows[one], rows) for one in pending]
        left = []
        for number, encoded in zip(pending, encode_all(encoder, texts, workers)):
            shots = plans[number].shots
            if isinstance(encoded, TokenRow) and shots and not _fits(encoded, rendering):
                plans[number] = replace(plans[number], shots=shots[:-1])
                left.append(number)
                pruned += 1
            else:
                done[number] = encoded
        pending = left
    good = _sorted_out(rendering, examples, plans, done, rejects, stop)
    kept = [plans[number] for number, _, _ in good]
    told = Counter(plan.variant for plan in kept)
    counts = {
        "variants": {name: told[name] for name in VARIANTS},
        "shots": sum(len(plan.shots) for plan in kept),
        "shots_pruned": pruned,
    }
    return [(example, tokens) for _, example, tokens in good], counts


def _rows_of(examples: Sequence[Example]) -> list[TaskRow]:
    rows = [example.fields for example in examples if example.fields is not None]
    assert len(rows) == len(examples), "a row that no task has read"
    return rows


def _fits(row: TokenRow, rendering: Rendering) -> bool:
    before = row.trained.index(True) if True in row.trained else len(row.ids)
    return before <= rendering.input_limit and len(row.ids) <= rendering.max_length


def _sorted_out(
    rendering: Rendering,
    examples: list[Example],
    plans: Mapping[int, Draw],
    done: Mapping[int, TokenRow | RowFault],
    rejects: list[Reject],
    stop: bool,
) -> list[tuple[int, Example, TokenRow]]:
    """The rows that could be encoded; of the others the first stops, or all join the rejects."""
    rows = _rows_of(examples)
    good = []
    for number, example in enumerate(examples):
        encoded = done[number]
        if isinstance(encoded, TokenRow):
            messages = rendering.messages(plans[number], rows[number], rows)
            good.append((number, replace(example, messages=messages), encoded))
            continue
        told = json.dumps(dict(rows[number].fields), ensure_ascii=False)
        bad = reject(encoded, example.file, example.line, told)
        if stop:
            raise bad.error
        rejects.append(bad)
    return good
