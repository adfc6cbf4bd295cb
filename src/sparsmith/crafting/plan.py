"""The plan: what crafting will change and what tuning will cost, before a weight is loaded.

Counts are exact (a test holds them against built models); memory is described in `memory.py`; FLOPs are 2 per multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.crafting.compose import check_base, check_composition
from sparsmith.crafting.lora_count import adapted_weights, adapts_experts, lora_parameters_of, merged_settings
from sparsmith.crafting.memory import BYTES, LENGTH_SHARE, Memory, optimizer_bytes, weight_bytes
from sparsmith.crafting.memory_per_rank import Load, RankMemory, memory_per_rank
from sparsmith.crafting.plan_text import plan_renderable, plan_text
from sparsmith.errors import CheckpointError, RecipeError
from sparsmith.methods import registry
from sparsmith.methods.base import Method, MethodConfig, MethodPlan, ModuleChange

if TYPE_CHECKING:
    from sparsmith.anatomy import ModelShape
    from sparsmith.methods.base import LoraSettings
    from sparsmith.recipe.schema import Recipe


@dataclass(frozen=True)
class Flops:
    """FLOPs per token. `context` tokens are attended to on average."""

    base_forward: int
    forward: int
    training: int
    context: int

    @property
    def overhead(self) -> float:
        """Forward cost over the base's."""
        return self.forward / self.base_forward


@dataclass(frozen=True)
class Plan:
    """What will be built and what it costs. Print it, or read `as_dict()`."""

    base: str
    methods: tuple[str, ...]
    changes: tuple[ModuleChange, ...]
    base_params: int
    total_params: int
    active_params: int
    trained: dict[str, int]
    memory: Memory
    flops: Flops
    disk: dict[str, int]
    notes: tuple[str, ...]
    per_rank: dict[str, dict[int, RankMemory]]
    """Layout (`ddp`, `fsdp2`, `qlora`) -> number of GPUs -> bytes on each."""

    @property
    def trained_params(self) -> int:
        return sum(self.trained.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "methods": list(self.methods),
            "changes": [vars(change) for change in self.changes],
            "parameters": {
                "base": self.base_params,
                "total": self.total_params,
                "active": self.active_params,
                "trained": dict(self.trained),
                "trained_total": self.trained_params,
            },
            "memory": self.memory.as_dict(),
            "memory_per_rank": {
                layout: {str(ranks): one.as_dict() for ranks, one in rows.items()}
                for layout, rows in self.per_rank.items()
            },
            "flops_per_token": {**vars(self.flops), "overhead": self.flops.overhead},
            "disk": dict(self.disk),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return plan_text(self.as_dict())

    def __rich__(self) -> Any:
        return plan_renderable(self.as_dict())


def plan(
    base: Any,
    config: MethodConfig | Sequence[MethodConfig],
    *,
    dtype: str = "float32",
    quant: str = "none",
    max_length: int = 512,
    micro_batch: int = 16,
    batch_size: int | None = None,
    optimizer: str = "adamw_torch",
    gradient_checkpointing: bool = False,
    task: str | None = None,
    classes: int | None = None,
) -> Plan:
    """Plan the crafting of `base`.

    Args:
        base: a folder or hub id (only its config is read), a transformers config, or a model.
        config: a method's config or a list of them.
        dtype, quant: number type and quantisation of the frozen base.
        max_length: tokens per row; micro_batch: rows per forward; batch_size: rows per step of all GPUs (default: `micro_batch`).
        optimizer: a name that the Trainer knows.
        task: `causal_lm`, `seq2seq`, or `seq_cls` of so many `classes`; absent = what the model, or the checkpoint, is for.

    Raises:
        UnsupportedAnatomy, MethodError, CheckpointError.
    """
    configs = (config,) if isinstance(config, MethodConfig) else tuple(config)
    name, hf_config = config_of(base, task, classes)
    check_composition(configs, anatomy.task_of(hf_config))
    shape = anatomy.shape_of(hf_config)
    pairs = [(registry.of(c), c) for c in configs]
    plans, crafted = _in_turn(pairs, hf_config)
    lora = _lora_of(pairs, crafted)
    trained = _by_role(plans, lora.count)
    apart = tuple(f"not for FSDP2: `{m.name}`, {reason}" for m, c in pairs if (reason := m.unsharded(c)))
    added = sum(sum(p.added.values()) for p in plans)
    total = shape.total_params + added - sum(p.removed for p in plans)
    count = sum(trained.values())

    load = Load(
        shape=shape,
        added=added + lora.count,
        trained=count,
        optimizer=optimizer_bytes(count, optimizer),
        dtype=dtype,
        quant=quant,
        activation_floats=sum(p.activation_floats for p in plans),
        lora=lora.settings,
        checkpointing=gradient_checkpointing,
        max_length=max_length,
        batch_size=batch_size or micro_batch,
        micro_batch=micro_batch,
        adapted_weights=lora.adapted,
        adapted_blocks=lora.blocks,
    )
    return Plan(
        base=name,
        methods=tuple(method.name for method, _ in pairs),
        changes=tuple(change for p in plans for change in p.changes),
        base_params=shape.total_params,
        total_params=total,
        active_params=total - sum(p.inactive for p in plans),
        trained=trained,
        memory=Memory(
            weights=weight_bytes(shape, load.added, dtype, quant),
            gradients=count * 4,
            optimizer=load.optimizer,
            activations={case: load.activations(micro_batch, quant, share) for case, share in LENGTH_SHARE.items()},
        ),
        flops=_flops(load, plans, lora, any(method.trains_base(c) for method, c in pairs)),
        disk={
            "delta": count * 4,
            "trainer_checkpoint": count * 4 + load.optimizer,
            "export": round(total * BYTES["bfloat16" if quant != "none" else dtype]),
        },
        notes=(*(note for p in plans for note in p.notes), *_adapting_note(load), *apart),
        per_rank={layout: rows for layout, rows in memory_per_rank(load).items() if layout != "fsdp2" or not apart},
    )


def _in_turn(pairs: Sequence[tuple[Method, MethodConfig]], config: Any) -> tuple[list[MethodPlan], Any]:
    """(each method's plan of what the one before it leaves, the config of what the last leaves)."""
    check_base(pairs, config)
    plans = []
    for method, settings in pairs:
        plans.append(method.plan_for(settings, config))
        config = method.crafted_config(settings, config)
    return plans, config


@dataclass(frozen=True)
class _Lora:
    """The LoRA of a composition on the model that crafting makes."""

    settings: LoraSettings | None
    linears: int
    """Parameters on linears."""
    stacked: int
    """Parameters on stacked experts."""
    adapted: int
    """Weights of the stacks of one sparse block that it changes."""
    made: ModelShape

    @property
    def count(self) -> int:
        return self.linears + self.stacked

    @property
    def blocks(self) -> int:
        return len(self.made.sparse.blocks) if self.made.sparse else 0


def _lora_of(pairs: Sequence[tuple[Method, MethodConfig]], crafted: Any) -> _Lora:
    row, made, experts = anatomy.of(crafted), anatomy.shape_of(crafted), adapts_experts(pairs)
    settings = merged_settings(pairs, made)
    linears, stacked = lora_parameters_of(settings, row, made, experts)
    return _Lora(settings, linears, stacked, adapted_weights(settings, row, made, experts), made)


def _by_role(plans: Sequence[MethodPlan], lora: int) -> dict[str, int]:
    """Trained parameters of all methods by role; `lora` is a role where there is one."""
    trained: dict[str, int] = {}
    for part in plans:
        for role, count in part.trained.items():
            trained[role] = trained.get(role, 0) + count
    return {**trained, "lora": lora} if lora else trained


def plan_recipe(recipe: Recipe, base_dir: Path | None = None, *, base: Any = None) -> Plan:
    """The plan of a recipe; `base`: a config in place of the recipe's own base."""
    from sparsmith.crafting.base_model import resolve_base

    start = base if base is not None else resolve_base(recipe.model.path, base_dir)
    if recipe.model.task == anatomy.SEQ_CLS:
        _check_length(recipe, anatomy.shape_of(config_of(start, recipe.model.task, recipe.model.num_labels)[1]))
    dtype = "float32" if recipe.model.dtype == "auto" else recipe.model.dtype  # `auto`: craft looks at what was read
    for settings in recipe.methods:
        registry.of(settings).check_stored(settings, dtype, recipe.model.quant == "nf4")  # type: ignore[arg-type]
    return plan(
        start,
        list(recipe.methods),  # type: ignore[arg-type]
        dtype=dtype,
        quant=recipe.model.quant,
        max_length=recipe.data.max_length,
        micro_batch=recipe.train.micro_batch_size or recipe.train.batch_size,
        batch_size=recipe.train.batch_size,
        optimizer=recipe.train.optimizer,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        task=recipe.model.task,
        classes=recipe.model.num_labels,
    )


def _check_length(recipe: Recipe, shape: ModelShape) -> None:
    """A row longer than the table of positions would stop the run when it first meets one."""
    if shape.positions and recipe.data.max_length > shape.max_length:
        raise RecipeError(
            "data.max_length",
            f"`{recipe.data.max_length}`",
            f"at most {shape.max_length}, the positions that {recipe.model.path} has",
            "Lower it.",
        )


def _adapting(shape: ModelShape, lora: _Lora, tokens: int) -> int:
    """FLOPs per token of training that a LoRA on stacked experts takes beside theirs, in forwards of so many tokens.

    The gradient of the summed weights passes as if the experts themselves trained (2 per weight that serves the token; for a model that is
    made of a dense one, what its experts add to the dense FFN counts thrice already), and all experts' sums are made once per forward
    (2 r per weight) and passed backward to both factors.
    """
    sparse = lora.made.sparse
    if not lora.adapted or lora.settings is None or sparse is None:
        return 0
    serving = round(lora.adapted * (1 if shape.sparse is None else sparse.top_k) / sparse.experts)
    return lora.blocks * (2 * serving + 6 * lora.settings.r * lora.adapted // max(tokens, 1))


def _adapting_note(load: Load) -> tuple[str, ...]:
    if not load.adapted_weights:
        return ()
    return (
        "LoRA on stacked experts: every forward makes the sums of the experts and their factors anew, and the activations hold "
        f"{load.adapted_bytes:,} bytes of them until the backward",
    )


def _flops(load: Load, plans: Sequence[MethodPlan], lora: _Lora, whole: bool) -> Flops:
    """Forward: as the shape says (`ModelShape.forward_flops`).

    Training: the frozen weights are passed forward and once backward (to their inputs), or not at all backward where every method says
    so; trained ones twice backward; `whole`: the base itself trains.
    """
    shape, context = load.shape, load.max_length // 2
    base = shape.forward_flops(context)
    added = sum(p.flops_forward for p in plans)
    tuned = added + sum(p.flops_tuning for p in plans)
    passes = 3 if whole else 2 if any(p.base_backward for p in plans) or lora.count else 1
    training = passes * base + 3 * tuned + 6 * lora.linears + _adapting(shape, lora, load.micro_batch * context)
    return Flops(base, base + added, training, context)


def config_of(base: Any, task: str | None, classes: int | None) -> tuple[str, Any]:
    """(name, transformers config) of what `plan` takes as a base; the config says the task."""
    name, config = _read_config(base)
    wanted = task or anatomy.task_of(base if hasattr(base, "named_parameters") else config)
    if wanted == anatomy.SEQ2SEQ:
        anatomy.require_task(config, wanted)
    return name, anatomy.for_task(config, wanted, classes)


def _read_config(base: Any) -> tuple[str, Any]:
    if not isinstance(base, (str, Path)):
        config = getattr(base, "config", base)
        return str(getattr(config, "_name_or_path", "") or type(config).__name__), config
    from transformers import AutoConfig

    from sparsmith.crafting.base_model import refuse_absent

    refuse_absent(str(base))
    try:
        return str(base), AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError, KeyError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise CheckpointError(
            f"model.path {base}", reason, "a folder or hub id with a config.json", "Check the path."
        ) from fault
