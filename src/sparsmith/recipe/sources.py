"""The sources of a recipe's rows: one file, folder or hub data set each, to train on or to evaluate on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from sparsmith.errors import nearest
from sparsmith.recipe.strict import Clash, StrictModel

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=64)]
"""A word that can also be a part of a file name: letters, digits and `_ . + -`."""
Text = Annotated[str, Field(min_length=1)]

COLUMN_FIELDS = ("prompt", "completion", "system", "text", "messages", "instruction", "input", "output")
"""What `columns` may map: the fields of the formats that the reader knows."""


class Source(StrictModel):
    """One file (or hub data set) of rows."""

    name: Name
    domain: Name
    """The group by which losses and expert load are told apart."""
    path: Text
    """File, folder or hub data set; relative to the recipe's folder."""
    columns: dict[str, str] = {}
    """Our field (`prompt`, `completion`, `system`, `text`, `messages`) -> a column, or a template such as
    `"{question}\\nOptions: {options}"`."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text"] = "auto"
    split: str | None = None
    """Split of a hub data set; in a folder, the part of a file's name that picks the files."""
    limit: PositiveInt | None = None
    """Use the first `limit` rows of the seeded order."""
    where: dict[str, Any] = {}
    """Keep only rows whose column equals the value (or one of a list; or `[low, high]` under the key `column:range`)."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the rows that are kept for evaluation when one file serves both. A row's side is drawn from a hash of its prompt
    alone: the same in every run, and rows with equal prompts are on one side. Give the same share at both sources."""
    part: Literal["all", "train", "heldout"] = "all"
    """Which side of the `heldout` split this source reads; needs `heldout`."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """Overrides `data.on_bad_row` for this source."""
    labels: tuple[str | bool, ...] | None = None
    """With task seq_cls: the names of the classes as this source's completions write them, in the order of their numbers; absent = the
    completions are the numbers, from 0. The first training source that has them names the classes of the model."""
    family: Text | None = None
    """The data set that the rows come from, whatever their form (`gsm8k`), or a mixture of them (`p3`, `niv2`, `flan2022`): what is
    evaluated on a family that is trained on counts as seen. Default: looked up by `name`."""
    licence: Text | None = None
    """Licence of the rows; told in the report and the model card."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """`labels` as text: YAML reads `true` as a boolean."""
        return None if self.labels is None else tuple(map(as_label, self.labels))

    def clashes(self) -> Iterable[Clash]:
        if self.heldout and self.part == "all":
            yield Clash("part", "nothing", "`train` or `heldout`, as heldout is set", "Add `part`.")
        if self.part != "all" and not self.heldout:
            yield Clash("heldout", "nothing", f"the share to split by, as part is `{self.part}`", "Add `heldout: 0.1`.")
        names = self.label_names or ()
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield Clash("labels", f"`{name}` twice", "a name for each class", "Rename one of them.")
        yield from self._column_clashes()

    def _column_clashes(self) -> Iterable[Clash]:
        for field in self.columns:
            if field not in COLUMN_FIELDS:
                yield Clash(
                    "columns." + field,
                    f"the unknown field `{field}`",
                    "a field of a row",
                    nearest(field, COLUMN_FIELDS),
                )


def as_label(value: Any) -> str:
    """A class's name as text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class TrainSource(Source):
    rate: NonNegativeFloat = 1.0
    """Weight in the mixture, multiplied by min(rows, cap) unless `data.mixing` is `rates`."""
    cap: PositiveInt | None = None
    """At most this many rows count for the mixture weight."""


class EvalSource(Source):
    metrics: tuple[Literal["loss", "rank", "exact_match"], ...] = ("loss",)
    """With task seq_cls `loss` alone, which brings the accuracy with it."""
    options: str | tuple[str, ...] | None = None
    """For `rank`: the column that holds the list of options, or the fixed options themselves."""
    extractor: Literal["exact", "first_line", "last_number", "after_marker", "first_word"] = "exact"
    """For `exact_match`: what of the generated text is the answer (the same is applied to the reference)."""
    marker: str = "####"
    """For `after_marker`."""
    max_new_tokens: PositiveInt = 64

    def clashes(self) -> Iterable[Clash]:
        yield from super().clashes()
        if "rank" in self.metrics and self.options is None:
            yield Clash("options", "nothing", "the options to rank, as metrics has rank", "Add `options`.")
        if "rank" not in self.metrics:
            yield from self.without_effect(["options"], "rank among the metrics")
        if "exact_match" not in self.metrics:
            yield from self.without_effect(["extractor", "marker", "max_new_tokens"], "exact_match among the metrics")
        elif self.extractor != "after_marker":
            yield from self.without_effect(["marker"], "extractor after_marker")
