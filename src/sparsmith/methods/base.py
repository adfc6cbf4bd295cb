"""The contract between a method and the rest of sparsmith.

A method is one object in a list (`registry.METHODS`). Nothing outside its folder knows its name: the planner, the crafting, the
objective, the proofs and the reports ask the questions below. A fifth method is a class like this one and one `register` call.

Words: a *role* is a group of trained tensors with one purpose (`adapter`, `router`, `lora`, ...); *crafted* is the model after
`craft`; *config* is the method's own frozen settings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from sparsmith.errors import MethodError
from sparsmith.recipe.strict import Clash, StrictModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparsmith.anatomy import Anatomy, ModelShape


FORMS = ("auto", "uniform", "per-layer", "zeros", "padded")
"""What a settled model may be written as, where a method deletes parts: every block alike; each block of its own size; the old shapes with
zeros; the widest block's shape with zeros. `auto` is the smallest that the model allows with a stock class, if there is one."""


class LoraSettings(StrictModel):
    """Low-rank adapters on the linears of attention and FFN, through PEFT."""

    enabled: bool = True
    r: Annotated[int, Field(gt=0)] = 64
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear` = the attention and FFN linears that the anatomy names, and the stacked experts where the method adapts them; or a list
    of their names."""

    def clashes(self) -> Iterable[Clash]:
        if not self.enabled:
            yield from self.without_effect(["r", "alpha", "dropout", "targets"], "enabled: true")


class MethodConfig(StrictModel):
    """Base of every method's settings. `method` is the key by which a recipe names it."""

    model_config = ConfigDict(**StrictModel.model_config)
    tasks: ClassVar[tuple[str, ...]] = ("causal_lm",)
    """What the method can tune; told here too, so that a recipe can be refused without loading its layers."""
    method: str


@dataclass(frozen=True)
class ModuleChange:
    """One row of the plan's table."""

    where: str
    """Module path, a range written `model.layers.{0..5}.mlp`."""
    what: str
    """Plain words: `FFN -> shared FFN + 8 adapters (r 64), top-2 router`."""
    count: int


@dataclass(frozen=True)
class MethodPlan:
    """What a method will do to a model of a given shape. All figures are exact counts, no estimates."""

    changes: tuple[ModuleChange, ...]
    added: Mapping[str, int]
    """New parameters by role."""
    removed: int = 0
    """Parameters of the base that will be gone."""
    inactive: int = 0
    """Parameters that are present but not used for one token (experts not chosen)."""
    trained: Mapping[str, int] = field(default_factory=dict)
    """Trained parameters by role."""
    flops_forward: int = 0
    """Extra forward FLOPs per token over the base (2 per multiply-add); negative when it saves."""
    flops_tuning: int = 0
    """Extra forward FLOPs per token while tuning alone (heads of further exits)."""
    base_backward: bool = True
    """False where no gradient passes through the base: only what was added is passed backward."""
    activation_floats: int = 0
    """Extra floats kept for the backward, per token, all layers."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossTerm:
    """A named part of the loss. The objective adds `weight * value`."""

    value: Tensor
    weight: float
    over_ranks: bool = False
    """The value is this rank's part of one over the rows of all ranks (their sum is meant); else it is a mean over this rank's rows."""


@dataclass(frozen=True)
class TaskLoss:
    """The task loss of a method that owns the objective, of one micro-batch."""

    value: Tensor
    """Scalar: this micro-batch's part of the loss of the whole accumulated batch."""
    token_losses: Tensor | None = None
    """(P,) detached losses of the labelled positions, for losses by domain; None where they were not computed."""


@dataclass(frozen=True)
class Control:
    """The run that a method's own run must be held against: same rows, steps and rates, only the loss differs."""

    config: MethodConfig | None
    """The method's settings in the control; None where the base itself is the control."""
    run: str | None
    """Folder of a control that was trained before; None = train it."""
    max_loss_gap: float
    """Nats by which the full model's held-out loss may exceed the control's."""


@dataclass(frozen=True)
class CraftContext:
    """What craft may need beside the model and its settings."""

    seed: int = 42
    base_id: str = ""
    """Path or hub id of the base, for the record."""


@dataclass
class Batch:
    """One micro-batch as the methods see it. B rows of S tokens; of a classifier each row is a text, never several packed. Of an
    encoder-decoder S tokens of each row are read and T written."""

    input_ids: Tensor
    """(B, S) int64"""
    labels: Tensor
    """(B, S) int64, -100 = no loss; not shifted. Of a classifier (B,) int64, the class; of an encoder-decoder (B, T) int64, the answer."""
    token_mask: Tensor
    """(B, S) bool, False = padding"""
    domain: Tensor | None = None
    """(B, S) int64 index of the token's domain, -1 = none"""
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    """Of an encoder-decoder (B, T) int64, the labels shifted right by one."""


class Method:
    """The contract. Defaults are the answers of a method that does nothing."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    """URL of the paper."""
    config_class: ClassVar[type[MethodConfig]]
    owns_objective: ClassVar[bool] = False
    """True where the method computes the task loss itself; at most one of a composition may."""
    reads_batches: ClassVar[bool] = True
    """False where `metrics` says nothing of the rows that ran, so that a run need not measure its evaluation rows for them."""
    tasks: ClassVar[tuple[str, ...]] = ("causal_lm",)
    """What the method can be tuned for: `causal_lm`, `seq_cls`, `seq2seq`. Of a classifier it names the class head as its role `classifier`
    (`anatomy.classifier_tensors`), else the head would not train."""
    rounding: ClassVar[float] = 1e-6
    """How far crafting may move a logit, over the largest one, where its algebra only sums in another order."""
    conflicts: ClassVar[Mapping[str, str]] = {}
    """Other method's name -> why the two cannot be combined."""

    def plan(self, config: Any, anatomy: Anatomy, shape: ModelShape) -> MethodPlan:
        """Count, from shapes alone, what `craft` will do. Must agree to the unit with the built model."""
        raise NotImplementedError

    def plan_for(self, config: Any, base_config: Any) -> MethodPlan:
        """`plan` from the base's transformers config, which a method may need whole."""
        from sparsmith.anatomy import of, shape_of

        return self.plan(config, of(base_config), shape_of(base_config))

    def check_stored(self, config: Any, dtype: str, packed: bool) -> None:
        """Refuse a base whose numbers the method cannot tune as the settings ask; the plan asks before a weight is read.

        Args:
            dtype: of its floats, the first one that is not float32, if any. packed: linears are held in 4 bits.
        """

    def takes(self, config: Any) -> str:
        """The models that the method can shape: `dense`, `sparse` (mixtures of experts) or `any`."""
        return "dense"

    def tunes_routers(self, config: Any) -> bool:
        """True where the method trains the routers of a mixture, with losses that keep its experts in use: a mixture is tuned with one
        such method or not at all."""
        return False

    def shifts(self, config: Any) -> str:
        """Why crafting changes the model's function, where a setting asks for it; empty where it must not."""
        return ""

    def crafted_config(self, config: Any, base_config: Any) -> Any:
        """The transformers config of the model that `craft` returns, from configs alone; the base's own (or nested in a wrapper's) where
        the stock class stays. `base_config` is left as it is."""
        return base_config

    def craft(self, model: nn.Module, config: Any, context: CraftContext) -> nn.Module:
        """Change the structure in place and return the crafted model (a new object where the class changes).

        Trained tensors come out with `requires_grad=True` and float32; the function of the model is unchanged.
        """
        raise NotImplementedError

    def while_proven(self, model: nn.Module, config: Any) -> AbstractContextManager[None]:
        """Around the forward by which crafting is proven to leave the function unchanged, for a model that needs training before it can be
        evaluated."""
        return nullcontext()

    def roles(self, model: nn.Module, config: Any) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trained tensors of this method by role, with their names in the crafted model."""
        raise NotImplementedError

    def wanted_roles(self, config: Any) -> tuple[str, ...]:
        """The roles that the config asks for: each must hold a tensor, and must move."""
        return ()

    def before_forward(self, model: nn.Module, config: Any, batch: Batch) -> None:
        """Hand the crafted modules what they need of the batch (token ids, mask). Called right before every training forward."""

    def loss_terms(self, model: nn.Module, config: Any, batch: Batch) -> dict[str, LossTerm]:
        """The method's own loss terms of the forward that has just run."""
        return {}

    def wanted_terms(self, config: Any) -> tuple[str, ...]:
        """Names of the terms that the config asks for: each must be there, finite and with a gradient."""
        return ()

    def rates(self, config: Any) -> Mapping[str, float]:
        """Role -> a learning rate of its own, without weight decay; other roles have the run's."""
        return {}

    def still_until(self, config: Any, total_steps: int) -> int:
        """The step, counted from 0, from which on every role of the method is bound to move; before it some may stand still."""
        return 0

    def check_steps(self, config: Any, total_steps: int) -> None:
        """Refuse a run of so many steps if a schedule of the method cannot unfold in it. Called before anything is loaded."""

    def final_from(self, config: Any, total_steps: int) -> int:
        """The step after which the model is in its final form, so that a later point of the run may be kept as its best
        (`train.select`); before it a point would be of another structure."""
        return 0

    def leaves_idle(self, config: Any) -> bool:
        """True where a step may leave a trained tensor without a gradient (a depth that is not run): DDP must then look for such
        tensors, which costs a walk through the graph in every step, and FSDP cannot be used."""
        return False

    def unsharded(self, config: Any) -> str:
        """Why the method's tensors cannot be cut over ranks by FSDP; empty where they can."""
        return ""

    def trains_base(self, config: Any) -> bool:
        """True where the base's linears themselves are trained, so that a LoRA on them would have no purpose."""
        return False

    def task_loss(self, model: nn.Module, config: Any, batch: Batch, num_items: Tensor | int) -> TaskLoss:
        """Only where `owns_objective`: the task loss in place of the plain cross-entropy."""
        raise NotImplementedError

    def depths(self, config: Any, layers: int) -> tuple[int, ...]:
        """The depths, in blocks, at which the model may be read out, ascending, the last being `layers`; () = only the full one."""
        return ()

    def tail_at(self, model: nn.Module, config: Any, depth: int) -> tuple[nn.Module, ...]:
        """Blocks of the method's own that follow block `depth` when the model is read out there."""
        return ()

    def exits_own(self, model: nn.Module, config: Any) -> bool:
        """True where the model holds blocks or heads that only some of its exits use."""
        return False

    def trains_alone(self, config: Any) -> str:
        """Why, with this method, the loss reaches no tensor but its own, so that no other method can train; empty where it does."""
        return ""

    def goes_alone(self, config: Any) -> str:
        """Why, with these settings, the method cannot be combined with any other; empty where it can."""
        return ""

    def cut(self, view: Any, config: Any, depth: int, layers: int) -> MethodConfig | None:
        """Make the method's part of `view`, which has the first `depth` of `layers` blocks and the tail alone, that of a model of this
        size; returns the settings that describe it, None where nothing of the method is left. Modules are shared with the model:
        replace, never change them."""
        return config

    def control(self, config: Any) -> Control | None:
        """What this method's run is held against, or None."""
        return None

    def after_forward(self, model: nn.Module, config: Any) -> None:
        """Drop what was held for one step (route logits, samples). Called after the backward of every micro-batch."""

    def on_step(self, model: nn.Module, config: Any, step: int, total_steps: int) -> None:
        """Called before optimiser step `step` (counted from 0)."""

    def metrics(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Health figures since the last call: flat numbers for the log; nested lists for the report under keys that start with
        `table/`. Resets the window."""
        return {}

    def health(self, metrics: Mapping[str, Any]) -> str:
        """A few words for the progress bar, from the last `metrics`."""
        return ""

    def warnings(self, metrics: Mapping[str, Any]) -> Mapping[str, str]:
        """Key -> a sentence that the user must be told after the last `metrics`; of each key the first is printed."""
        return {}

    def settle(self, model: nn.Module, config: Any) -> nn.Module:
        """Make soft choices hard, in place."""
        return model

    def form(self, model: nn.Module, config: Any, asked: str) -> str:
        """Which of `FORMS` but `auto` a settled model will take when `asked` is wanted; empty where the method deletes nothing. Changes
        nothing, and refuses what cannot be.

        Raises:
            LayoutMismatch.
        """
        return ""

    def prune(self, model: nn.Module, config: Any, form: str = "auto") -> nn.Module:
        """Delete what settling has closed. Called after every method has settled and the LoRA is merged, so that weights are plain."""
        return model

    def tables(self, model: nn.Module, config: Any, form: str) -> Mapping[str, Any]:
        """What the report shall know of the settled model before `prune`: name -> plain data. One named `accounting` holds `counted` and
        `deletable`, and is held against the files (`crafting/accounting.py`)."""
        return {}

    def cautions(self, model: nn.Module, config: Any) -> tuple[str, ...]:
        """What a user of the exported model must know, in sentences."""
        return ()

    def foreign(self, model: nn.Module, config: Any, kind: str) -> Mapping[str, Any]:
        """File name -> JSON data of a config for another runtime, of a pruned model; empty where the method knows none of this kind."""
        return {}

    def inactive(self, model: nn.Module, config: Any, anatomy: Anatomy, shape: ModelShape) -> int:
        """Parameters of the built model that are not used for one token."""
        return self.plan(config, anatomy, shape).inactive

    def settled_config(self, config: Any, base_config: Any) -> Any:
        """The config of the dense model that settling leaves, from configs alone; the base's own where the method changes no shape.
        `base_config` is left as it is.

        Raises:
            MethodError: what settling leaves is no stock dense model, so that no further stage can craft it.
        """
        if self.standalone_sources():
            raise MethodError(
                f"methods: {self.name}",
                "a settled model with structures of its own",
                "one whose settled model is a stock dense one, where another stage follows",
                f"Let `{self.name}` be in the last stage.",
            )
        return base_config

    def settled_note(self, config: Any) -> str:
        """Why `settled_config` is an expectation alone (widths that are learned); empty where it is exact."""
        return ""

    def state(self, model: nn.Module, config: Any) -> dict[str, Tensor]:
        """The tensors that a delta checkpoint must hold for this method (LoRA is kept apart, by PEFT)."""
        return {name: parameter.detach() for role in self.roles(model, config).values() for name, parameter in role}

    def files_config(self, model: nn.Module, config: Any) -> Mapping[str, Any]:
        """Keys that the written config.json shall hold beside those that the library writes: older spellings that others look for."""
        return {}

    def fold_scale(self, model: nn.Module, config: Any) -> Any:
        """Multiply constant scales into the weights, in place, and return the config that holds from then on."""
        return config

    def standalone_sources(self) -> tuple[str, ...]:
        """Dotted module names, lowest first, that a full checkpoint needs in its self-contained modelling file; empty where the
        settled model is a stock architecture."""
        return ()

    def asks_lora(self, config: Any) -> bool:
        """False where the settings hold a LoRA that this way of tuning does not use."""
        return True

    def keeps_type(self, model: nn.Module, config: Any) -> Collection[str]:
        """Of a model of a class of the method's own: names of the tensors that stay float32 when the rest is rounded."""
        return self.state(model, config).keys()

    def adapts_experts(self, config: Any) -> bool:
        """True where the LoRA that the method asks for goes on the stacked experts of every sparse block too, as a pair of factors for each
        expert; its `targets` may then name the stacked tensors. Such a LoRA has no dropout."""
        return False

    def lora(self, config: Any, shape: ModelShape | None = None) -> LoraSettings | None:
        """The LoRA that crafting must inject after every method has grafted its modules, or None. Its size may depend on the model's
        shape."""
        return None


CraftFunction = Callable[["torch.nn.Module", Any, CraftContext], "torch.nn.Module"]
RoleTable = Mapping[str, Iterable[tuple[str, "torch.nn.Parameter"]]]
