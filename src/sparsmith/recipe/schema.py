"""The recipe: everything that a run is made of, as typed and frozen settings.

The method entries are validated by the methods' own config classes, which stand on a higher floor; the loader is handed them
(`load_recipe(..., method_configs=...)`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from sparsmith.recipe.strict import StrictModel

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class ModelSettings(StrictModel):
    """The dense base."""

    path: str
    """A folder with a Hugging Face checkpoint, a hub id, or `embedded` for the base that ships with sparsmith."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Number type of the frozen base. Trained weights are always held in float32."""
    quant: Literal["none", "nf4"] = "none"
    """`nf4`: 4-bit NormalFloat base with double quantisation (bitsandbytes), bfloat16 compute."""
    task: Literal["causal_lm", "seq_cls"] = "causal_lm"
    num_labels: PositiveInt | None = None
    """Number of classes; required by `seq_cls` and refused otherwise."""
    revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Run model code that lies beside the weights. Off unless asked for."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"

    @model_validator(mode="after")
    def _labels_belong_to_a_classifier(self):
        if (self.task == "seq_cls") != (self.num_labels is not None):
            raise ValueError("num_labels is required by task seq_cls, and by it alone")
        return self


class Source(StrictModel):
    """One file (or hub data set) of rows."""

    name: str
    domain: str
    """The group by which losses and expert load are told apart."""
    path: str
    """File, folder or hub data set; relative to the recipe's folder."""
    columns: dict[str, str] = {}
    """Our field (`prompt`, `completion`, `system`, `text`, `messages`) -> a column, or a template such as
    `"{question}\\nOptions: {options}"`."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text"] = "auto"
    split: str | None = None
    """Split of a hub data set."""
    limit: PositiveInt | None = None
    """Use the first `limit` rows of the seeded order."""
    where: dict[str, Any] = {}
    """Keep only rows whose column equals the value (or one of a list; or `[low, high]` under the key `column:range`)."""
    on_bad_row: Literal["stop", "skip"] | None = None
    """Overrides `data.on_bad_row` for this source."""


class TrainSource(Source):
    rate: NonNegativeFloat = 1.0
    """Weight in the mixture, multiplied by min(rows, cap) unless `data.mixing` is `rates`."""
    cap: PositiveInt | None = None
    """At most this many rows count for the mixture weight."""


class EvalSource(Source):
    metrics: tuple[Literal["loss", "rank", "exact_match"], ...] = ("loss",)
    options: str | tuple[str, ...] | None = None
    """For `rank`: the column that holds the list of options, or the fixed options themselves."""
    extractor: Literal["exact", "first_line", "last_number", "after_marker", "first_word"] = "exact"
    """For `exact_match`: what of the generated text is the answer (the same is applied to the reference)."""
    marker: str = "####"
    """For `after_marker`."""
    max_new_tokens: PositiveInt = 64

    @model_validator(mode="after")
    def _rank_needs_options(self):
        if ("rank" in self.metrics) != (self.options is not None):
            raise ValueError("options is required by the metric rank, and by it alone")
        return self


class DataSettings(StrictModel):
    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    eval: tuple[EvalSource, ...] = ()
    template: str | Literal["chat"] | None = None
    """Prompt text with the fields `{system}` and `{prompt}`; `chat` = the tokenizer's chat template; absent = the chat template
    where the tokenizer has one, else `### Human:\\n{prompt}\\n### Assistant:\\n`."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per row."""
    packing: bool = True
    """Put several rows in one of `max_length` tokens, attention block-diagonal."""
    over_long: Literal["drop", "truncate", "stop"] = "drop"
    """Rows of more than `max_length` tokens: left out, cut at the end (dropped where no answer token is left), or an error."""
    loss_on: Literal["response", "all"] = "response"
    on_bad_row: Literal["stop", "skip"] = "stop"
    mixing: Literal["balanced", "sizes", "rates"] = "sizes"
    """`sizes`: weight = rate x min(rows, cap); `rates`: weight = rate; `balanced`: each domain has the same weight, inside it as
    `sizes`."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0 = one per core."""
    cache: str | None = None
    """Folder of the token cache; default: the user's cache folder."""


class TrainSettings(StrictModel):
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Exactly one of `steps` and `epochs`."""
    batch_size: PositiveInt = 16
    """Rows per optimiser step and process, accumulation included."""
    micro_batch_size: PositiveInt | None = None
    """Rows per forward; default: `batch_size` (no accumulation). Must divide `batch_size`."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Fraction of all steps."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: Annotated[float, Field(gt=0)] | None = 0.3
    """Largest norm of the whole gradient."""
    optimizer: str = "adamw_torch"
    """A name that the transformers Trainer knows (`paged_adamw_32bit`, ...)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast type; `auto` = bfloat16 on a CUDA device that has it, else float32."""
    gradient_checkpointing: bool = False
    save_every: PositiveInt | None = None
    """Steps; absent = only at the end."""
    keep: PositiveInt = 2
    """Checkpoints kept."""
    eval_every: PositiveInt | None = None
    log_every: PositiveInt = 10
    seed: Annotated[int, Field(ge=0)] = 42
    threads: PositiveInt | None = None
    """CPU threads; absent = torch's default."""
    report_to: tuple[str, ...] = ()
    """Trackers of the transformers Trainer (`trackio`, `wandb`, `tensorboard`, ...)."""

    @model_validator(mode="after")
    def _length_and_batch(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("micro_batch_size must divide batch_size")
        return self


class ProofSettings(StrictModel):
    enabled: bool = True
    moved_after: PositiveInt = 20
    """Optimiser steps after which every trained role must have changed."""


class Recipe(StrictModel):
    model: ModelSettings
    methods: Annotated[tuple[SerializeAsAny[StrictModel], ...], Field(min_length=1)]
    data: DataSettings
    train: TrainSettings
    output: str
    """The run's folder; relative to the working folder."""
    proof: ProofSettings = ProofSettings()
