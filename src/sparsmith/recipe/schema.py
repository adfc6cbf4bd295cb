"""The recipe: everything that a run is made of, as typed and frozen settings.

The method entries are validated by the methods' own config classes, which stand on a higher floor; the loader is handed them
(`load_recipe(..., method_configs=...)`).
"""

from __future__ import annotations

from collections.abc import Iterable
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from sparsmith.recipe.mixture import MixtureSettings
from sparsmith.recipe.protocol import ProtocolSettings
from sparsmith.recipe.sources import (
    EvalSource,
    Name,
    NonNegativeFloat,
    PositiveInt,
    Source,
    Text,
    TrainSource,
    as_label,
)
from sparsmith.recipe.strict import Clash, StrictModel

__all__ = [
    "DataSettings",
    "EvalSource",
    "MixtureSettings",
    "ModelSettings",
    "Name",
    "NonNegativeFloat",
    "PositiveInt",
    "ProofSettings",
    "Recipe",
    "SelectSettings",
    "Source",
    "Text",
    "TrainSettings",
    "TrainSource",
    "as_label",
]


class ModelSettings(StrictModel):
    """The dense base."""

    path: Text
    """A folder with a Hugging Face checkpoint, a hub id, or `embedded` for the base that ships with sparsmith."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Number type of the frozen base. Trained weights are always held in float32."""
    quant: Literal["none", "nf4"] = "none"
    """`nf4`: 4-bit NormalFloat base with double quantisation (bitsandbytes), bfloat16 compute."""
    task: Literal["causal_lm", "seq_cls", "seq2seq"] = "causal_lm"
    """`seq_cls`: a class for each text, of a decoder or an encoder; where the checkpoint has no class head one is drawn from the seed.
    `seq2seq`: an encoder-decoder, whose encoder reads a row's prompt and whose decoder writes its answer (docs/switch.md). Both only
    with methods that do it."""
    num_labels: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; required by `seq_cls` and refused otherwise."""
    revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Run model code that lies beside the weights. Off unless asked for."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"

    def clashes(self) -> Iterable[Clash]:
        if self.task == "seq_cls" and self.num_labels is None:
            yield Clash("num_labels", "nothing", "the number of classes, as the task is seq_cls", "Add `num_labels`.")
        if self.task != "seq_cls":
            yield from self.without_effect(["num_labels"], "task seq_cls")


class DataSettings(StrictModel):
    train: tuple[TrainSource, ...] = ()
    """What is trained on, as the rows stand. Exactly one of `train` and `mixture`."""
    mixture: MixtureSettings | None = None
    """In place of `train`: tasks in sub-mixtures, each row rendered by a template."""
    eval: tuple[EvalSource, ...] = ()
    template: Text | None = None
    """Prompt text with the fields `{system}` and `{prompt}`; `chat` = the tokenizer's chat template; absent = the chat template
    where the tokenizer has one, else `### Human:\\n{prompt}\\n### Assistant:\\n`; with task seq_cls or seq2seq absent = `{prompt}`."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per row."""
    packing: bool = True
    """Put several rows in one of `max_length` tokens, attention block-diagonal. Always off with task seq_cls, where each text has a class,
    and with seq2seq, whose encoder reads one prompt."""
    over_long: Literal["drop", "truncate", "stop"] = "drop"
    """Rows of more than `max_length` tokens: left out, cut at the end (dropped where no answer token is left), or an error."""
    loss_on: Literal["response", "all"] = "response"
    on_bad_row: Literal["stop", "skip"] = "stop"
    mixing: Literal["balanced", "sizes", "rates"] = "sizes"
    """`sizes`: weight = rate x min(rows, cap); `rates`: weight = rate; `balanced`: each domain has the same weight, inside it as
    `sizes`."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0 = one per core."""
    cache: Text | None = None
    """Folder of the token cache; default: the user's cache folder."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The training sources: those of `train`, or the tasks of `mixture` with their domains filled in."""
        return self.train if self.mixture is None else self.mixture.tasks

    def clashes(self) -> Iterable[Clash]:
        if not self.train and self.mixture is None:
            yield Clash("train", "nothing", "at least one source, or a `mixture`", "Add `train`.")
        if self.mixture is not None:
            yield from self._mixture_clashes(self.mixture)
        if self.template is not None and self.template != "chat":
            fault = _template_fault(self.template)
            if fault:
                yield Clash("template", fault, "text with {prompt} (and, if wanted, {system})", "Mend the template.")
        if self.mixing == "rates":
            for index, source in enumerate(self.train):
                for clash in source.without_effect(["cap"], "mixing sizes or balanced"):
                    yield Clash(f"train.{index}.{clash.key}", clash.found, clash.expected, clash.mend)
        if self.train and not any(source.rate for source in self.train):
            yield Clash("train.0.rate", "no source with a rate above 0", "at least one", "Raise a rate.")

    def _mixture_clashes(self, mixture: MixtureSettings) -> Iterable[Clash]:
        if self.train:
            yield Clash("mixture", "`mixture` beside `train`", "one of the two", "Remove one of them.")
        if self.loss_on != "response":
            mend = "Remove `loss_on`: of a rendered row the answer alone is learned."
            yield Clash("loss_on", f"`{self.loss_on}`", "response, as `mixture` is set", mend)
        yield from self.without_effect(["mixing"], "sources under `train`: a mixture has rates of its own")
        for key, value in (("max_input", mixture.max_input), ("max_target", mixture.max_target)):
            if mixture.changed(key) and value > self.max_length:
                found = f"`{value}`, which has no effect here"
                expected = f"at most max_length, which is {self.max_length} tokens for input and target together"
                yield Clash(f"mixture.{key}", found, expected, "Raise data.max_length, or remove the key.")


def _template_fault(template: str) -> str:
    """What is wrong with a prompt template, or nothing."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"a template that cannot be read ({error})"
    unknown = [name for name in fields if name not in ("prompt", "system")]
    if unknown:
        return f"the unknown field {{{unknown[0]}}}"
    return "" if "prompt" in fields else "no field {prompt}"


class SelectSettings(StrictModel):
    """With task seq_cls: the best of several points of the run is kept, chosen on rows that are cut from the training sources. No row that
    is reported on takes part."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the training rows, drawn from the seed."""
    max_rows: PositiveInt = 1000
    every: PositiveInt
    """Steps between two looks; the last step is looked at too."""


class TrainSettings(StrictModel):
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Exactly one of `steps` and `epochs`."""
    batch_size: PositiveInt = 16
    """Rows per optimiser step, of all processes together and accumulation included."""
    micro_batch_size: PositiveInt | None = None
    """Rows per forward of one process; default: its whole share of `batch_size` (no accumulation). Must divide `batch_size`."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of all steps."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: Annotated[float, Field(gt=0)] | None = 0.3
    """Largest norm of the whole gradient."""
    optimizer: Text = "adamw_torch"
    """A name that the transformers Trainer knows (`paged_adamw_32bit`, ...)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast type; `auto` = bfloat16 on a CUDA device that has it, else float32."""
    gradient_checkpointing: bool = False
    dry_step: bool = True
    """Before step 1, try the longest micro-batch once, so that too little memory is told at once and not hours later. Changes no bit of
    the run."""
    save_every: PositiveInt | None = None
    """Steps; absent = only at the end."""
    keep: PositiveInt = 2
    """Checkpoints kept, of those that `save_every` writes."""
    eval_every: PositiveInt | None = None
    """Steps between measurements of the held-out loss; absent = only before and after."""
    log_every: PositiveInt = 10
    select: SelectSettings | None = None
    """Absent = the weights of the last step are kept."""
    seed: Annotated[int, Field(ge=0)] = 42
    threads: PositiveInt | None = None
    """CPU threads; absent = torch's default."""
    report_to: tuple[str, ...] = ()
    """Trackers of the transformers Trainer (`trackio`, `wandb`, `tensorboard`, ...)."""

    def clashes(self) -> Iterable[Clash]:
        if self.steps is None and self.epochs is None:
            yield Clash("steps", "neither steps nor epochs", "one of them", "Add `steps`.")
        if self.steps is not None and self.epochs is not None:
            yield Clash(
                "epochs",
                "both steps and epochs",
                "one of them",
                "Remove one (`train.epochs=null` on the command line).",
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            yield Clash(
                "micro_batch_size",
                f"`{self.micro_batch_size}`",
                f"a divisor of batch_size, which is {self.batch_size}",
                "Change one of the two.",
            )
        if self.schedule == "constant":
            yield from self.without_effect(["warmup"], "schedule constant_with_warmup, cosine or linear")
        if self.save_every is None:
            yield from self.without_effect(["keep"], "save_every")
        if self.select and self.steps and self.select.every >= self.steps:
            yield Clash(
                "select.every",
                f"`{self.select.every}`",
                f"fewer than {self.steps} steps, or there is no choice",
                "Lower it.",
            )


class ProofSettings(StrictModel):
    enabled: bool = True
    moved_after: PositiveInt | None = None
    """Optimiser steps after which every trained role must have changed; absent = 20."""

    @property
    def looks_after(self) -> int | None:
        """The step of the look; None where nothing is proven."""
        return (self.moved_after or 20) if self.enabled else None

    def clashes(self) -> Iterable[Clash]:
        if not self.enabled:
            yield from self.without_effect(["moved_after"], "enabled: true")


class Recipe(StrictModel):
    model: ModelSettings
    methods: Annotated[tuple[SerializeAsAny[StrictModel], ...], Field(min_length=1)]
    data: DataSettings
    train: TrainSettings
    output: Text
    """The run's folder; relative to the working folder."""
    proof: ProofSettings = ProofSettings()
    protocol: ProtocolSettings | None = None
    """Sides and tasks of `sparsmith protocol flan-moe`; the other verbs pass over it."""
