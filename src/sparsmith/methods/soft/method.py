"""SoFT behind the contract of a method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy.four_bit import stored
from sparsmith.errors import CrossLayerStateError, MethodError, ProofError, TiedHeadError
from sparsmith.methods.base import (
    Batch,
    Control,
    CraftContext,
    Method,
    MethodConfig,
    MethodPlan,
    ModuleChange,
    TaskLoss,
)
from sparsmith.methods.soft import parts
from sparsmith.methods.soft.config import SoftConfig, block_params
from sparsmith.methods.soft.forward import called_once, labelled, tail_states, trunk_states
from sparsmith.methods.soft.schedule import active_weights, choices, draw_index, kept_layers
from sparsmith.ops.balance import several_ranks, sum_over_ranks
from sparsmith.ops.depth_loss import Distillation, Exit, depth_losses

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape
    from sparsmith.methods.base import LoraSettings


class SoftMethod(Method):
    name: ClassVar[str] = "soft"
    title: ClassVar[str] = "SoFT: one model, every depth"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.08968"
    config_class: ClassVar[type[MethodConfig]] = SoftConfig
    owns_objective: ClassVar[bool] = True

    # what it is

    def takes(self, config: SoftConfig) -> str:
        return "any"

    def plan(self, config: SoftConfig, anatomy: Anatomy, shape: ModelShape) -> MethodPlan:
        check_shape(config, shape)
        exits, omega = config.depths(shape.layers), config.omega(shape.layers)
        added = config.num_params(shape)
        shown = ", ".join(map(str, exits))
        changes = [
            ModuleChange(f"{anatomy.blocks}.{{0..{shape.layers - 1}}}", f"read out after {shown} blocks", len(exits))
        ]
        if config.arm == "ict":
            changes.append(ModuleChange(parts.EXITS, "a head of its own", len(exits) - 1))
        elif config.trunk == "frozen":
            changes.append(ModuleChange(parts.EXITS, "a block of its own, from the next one", len(exits) - 1))
        heads = len([n for n in omega if n != shape.layers])
        extra = 2 * heads * shape.vocab * shape.hidden + 2 * added.get("exit_block", 0)
        return MethodPlan(
            changes=tuple(changes),
            added=added,
            trained=config.num_trained(shape),
            flops_tuning=extra,
            base_backward=not config.frozen_trunk,
            activation_floats=2 * len(omega) * shape.hidden,
            notes=_notes(config, shape, exits, heads),
        )

    def check_stored(self, config: SoftConfig, dtype: str, packed: bool) -> None:
        if config.arm == "ict" or config.trunk == "frozen":
            return
        if config.tune == "full" and (packed or dtype != "float32"):
            raise MethodError(
                "soft.tune",
                f"`full` on a base in {'nf4' if packed else dtype}",
                "a base in float32: small updates round away in fewer bits",
                "Set model.dtype to float32 (train.precision may still be bfloat16), or take tune lora or qlora.",
            )
        if config.tune != "full" and packed != (config.tune == "qlora"):
            raise MethodError(
                "soft.tune",
                f"`{config.tune}` on a base {'in nf4' if packed else 'that is not quantised'}",
                "`qlora` with model.quant nf4, `lora` without",
                "Change one of the two.",
            )

    def craft(self, model: nn.Module, config: SoftConfig, context: CraftContext) -> nn.Module:
        row, shape = anatomy.anatomy_of(model), anatomy.shape_of(model.config)
        check_shape(config, shape)
        if (
            anatomy.base_of(model) is model
        ):  # what another method has wrapped was looked at then, and may need a whole forward
            anatomy.probe(model)
        exits = config.depths(shape.layers)
        config.check_exits(shape.layers)
        self.check_stored(config, *stored(model))
        if config.arm == "ict":
            parts.add_heads(model, exits[:-1])
        elif config.trunk == "frozen":
            parts.add_blocks(model, exits[:-1])
        elif config.tune != "full":
            if config.head == "train" and shape.tied and not config.untie:
                raise TiedHeadError(
                    "soft.head",
                    "`train`, with a head that is the embedding matrix",
                    "`freeze`, or `untie: true`",
                    f"untie adds {shape.vocab * shape.hidden:,} parameters.",
                )
            if config.untie:
                if not shape.tied:
                    raise MethodError(
                        "soft.untie", "`true` for a head that has weights of its own", "false", "Remove `untie`."
                    )
                parts.untie_head(model)
            if config.train_norm:
                parts.hold_masters(model, row.norm)
            if config.trains_head:
                parts.hold_masters(model, row.head)
        parts.attach_state(model, context.seed)
        return model

    def roles(self, model: nn.Module, config: SoftConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if config.frozen_trunk:
            role = "exit_head" if config.arm == "ict" else "exit_block"
            return {role: [(names[id(p)], p) for part in parts.exits_of(model).values() for p in part.parameters()]}
        base, row = anatomy.base_of(model), anatomy.anatomy_of(model)
        shape = anatomy.shape_of(model.config)
        wanted: dict[str, list[nn.Parameter]] = {}
        if config.tune == "full":
            wanted["block"] = [p for block in anatomy.blocks(model) for p in _own(block)]
            if not shape.tied or config.trains_head:
                wanted["embedding"] = list(anatomy.walk(base, row.embeddings).parameters())
            if row.positions:
                wanted.setdefault("embedding", []).extend(anatomy.walk(base, row.positions).parameters())
        if config.tune == "full" or config.train_norm:
            wanted["norm"] = list(anatomy.walk(base, row.norm).parameters())
        if config.trains_head and (not shape.tied or config.untie):
            wanted["head"] = list(anatomy.head(model).parameters())
        return {role: [(names[id(p)], p) for p in found] for role, found in wanted.items() if found}

    def wanted_roles(self, config: SoftConfig) -> tuple[str, ...]:
        if config.frozen_trunk:
            return ("exit_head" if config.arm == "ict" else "exit_block",)
        if config.tune == "full":
            return ("block", "norm")
        return ("norm",) * config.train_norm + ("head",) * config.trains_head

    def lora(self, config: SoftConfig, shape: ModelShape | None = None) -> LoraSettings | None:
        return config.lora if config.low_rank else None

    def trains_base(self, config: SoftConfig) -> bool:
        return config.tune == "full" and not config.frozen_trunk

    def leaves_idle(self, config: SoftConfig) -> bool:
        return (
            config.schedule == "sampled"
            or config.layer_dropout > 0
            or (config.frozen_trunk and config.schedule != "all")
        )

    # the loss

    def on_step(self, model: nn.Module, config: SoftConfig, step: int, total_steps: int) -> None:
        state = parts.state_of(model)
        state.step, state.micro = step, 0

    def task_loss(self, model: nn.Module, config: SoftConfig, batch: Batch, num_items: Tensor | int) -> TaskLoss:
        """Eq. 1 of the paper, with the weights of this micro-batch, over `num_items` labels."""
        state, layers = parts.state_of(model), len(anatomy.blocks(model))
        omega = config.omega(layers)
        draw = draw_index(
            choices(config.schedule, len(omega) + config.frozen_trunk), state.seed, state.step, state.micro
        )
        active = _active(config, omega, layers, draw, state.step)
        kept = None
        if config.layer_dropout > 0:
            kept = kept_layers(layers, config.layer_dropout, seed=state.seed, step=state.step, micro=state.micro)
        state.micro += 1
        select, labels = labelled(batch)
        distil = Distillation(config.kl.weight, config.kl.temperature) if config.kl else None
        depths = sorted(active)
        states, at_end = _states(model, config, batch, depths, select, kept, distil is not None, layers)
        if config.ce.impl == "torch":
            _check_bare(model)
        head: nn.Module = anatomy.head(model)
        forward = head.forward

        def losses_of(*hidden: Tensor) -> tuple[Tensor, Tensor]:
            exits = [_exit(model, config, n, active[n], h, forward) for n, h in zip(depths, hidden)]
            full = _exit(model, config, layers, 0.0, at_end, forward) if at_end is not None else None
            impl = "fused" if config.ce.impl == "auto" else config.ce.impl
            return depth_losses(exits, labels, impl=impl, chunk=config.ce.chunk, kl=distil, full=full)

        inputs = [states[n] for n in depths]
        value, losses = losses_of(*inputs) if config.arm == "ict" else called_once(head, losses_of, *inputs)
        for depth, own in zip(depths, losses):
            state.add(depth, own, len(labels))
        at_full = next((own for depth, own in zip(depths, losses) if depth == layers), None)
        told = at_full if at_full is not None and len(at_full) == len(labels) else None
        return TaskLoss(value / num_items, told)

    def metrics(self, model: nn.Module, config: SoftConfig) -> dict[str, Any]:
        """`loss_at_{depth}` in nats per labelled token since the last reading, over all ranks."""
        state, layers = parts.state_of(model), len(anatomy.blocks(model))
        depths = config.depths(layers)
        zero = torch.zeros((), dtype=torch.float64)
        rows = [torch.stack([table.get(n, zero).cpu() for n in depths]) for table in (state.loss, state.count)]
        sums = torch.cat(rows)
        if several_ranks():
            device = next(model.parameters()).device
            sums = sum_over_ranks(sums.to(device)).cpu()
        state.loss, state.count = {}, {}
        loss, count = sums.split(len(depths))
        return {f"loss_at_{n}": (a / b).item() for n, a, b in zip(depths, loss, count) if b > 0}

    def health(self, metrics: Mapping[str, Any]) -> str:
        return " ".join(f"{name.removeprefix('loss_at_')}:{value:.2f}" for name, value in metrics.items())

    # the result

    def settle(self, model: nn.Module, config: SoftConfig) -> nn.Module:
        """Masters become plain weights; exit blocks take the trunk's number type."""
        row = anatomy.anatomy_of(model)
        for path in (row.norm, row.head):
            parts.release_masters(model, path)
        for part in parts.exits_of(model).values():
            part.to(parts.trunk_dtype(model))
        return model

    def settled_config(self, config: SoftConfig, base_config: Any) -> Any:
        """The whole depth, as a dense model; a head of its own is its one difference in shape."""
        if config.frozen_trunk:
            raise MethodError(
                "methods: soft",
                "a frozen trunk, whose full depth is the base as it was, beside exits with parts of their own",
                "a settled model that is dense and has learned, where another stage follows",
                "Let soft be in the last stage, or train the trunk.",
            )
        if not config.untie:
            return base_config
        settled = copy.deepcopy(base_config)
        settled.tie_word_embeddings = False
        return settled

    def depths(self, config: SoftConfig, layers: int) -> tuple[int, ...]:
        return config.depths(layers)

    def tail_at(self, model: nn.Module, config: SoftConfig, depth: int) -> tuple[nn.Module, ...]:
        owned = parts.exits_of(model).get(depth)
        if owned is None or "block" not in owned:
            return ()
        return (parts.as_read_out(owned["block"], parts.trunk_dtype(model)),)

    def exits_own(self, model: nn.Module, config: SoftConfig) -> bool:
        return bool(parts.exits_of(model))

    def trains_alone(self, config: SoftConfig) -> str:
        return "a frozen trunk, through which no loss reaches other tensors than the exits'" * config.frozen_trunk

    def cut(self, view: Any, config: SoftConfig, depth: int, layers: int) -> MethodConfig | None:
        """A shared trunk cut at n is an elastic model of the exits up to n; a frozen one's slice is a plain model."""
        owned = parts.exits_of(view).get(depth)
        view._modules.pop(parts.EXITS, None)
        if config.frozen_trunk:
            if owned is not None and "head" in owned:
                _swap_head(view, parts.as_read_out(owned["head"], parts.trunk_dtype(view)))
            return None
        return config.model_copy(update={"exits": tuple(n for n in config.depths(layers) if n <= depth)})

    def control(self, config: SoftConfig) -> Control | None:
        if config.arm != "soft":
            return None
        if config.frozen_trunk:
            return Control(None, None, 0.0)
        kept = {name: getattr(config, name) for name in ("tune", "lora", "train_norm", "head", "untie", "exits", "ce")}
        changed = {name: value for name, value in kept.items() if config.changed(name)}
        return Control(
            SoftConfig(arm="sft", **changed),
            None if config.control == "train" else config.control,
            config.guard.max_loss_gap,
        )


def check_shape(config: SoftConfig, shape: ModelShape) -> None:
    """Refuse exits that this model cannot have.

    Raises:
        CrossLayerStateError: blocks share state. MethodError: an exit of a hybrid model without a full-attention block below it.
    """
    if shape.cross_layer:
        raise CrossLayerStateError(
            f"soft on {shape.model_type}",
            shape.cross_layer,
            "blocks that read nothing but the hidden state of the block before",
            "The last blocks of this model cannot be left out.",
        )
    kinds = shape.attention_kinds
    if "full_attention" in kinds and "sliding_attention" in kinds:
        first = kinds.index("full_attention") + 1
        shallow = [n for n in config.depths(shape.layers) if n < first]
        if shallow:
            raise MethodError(
                "soft.exits",
                f"{shallow}, all sliding attention",
                f"exits from {first}, where the first full-attention block is",
                "A sub-model without full attention sees no further than its window.",
            )


def _notes(config: SoftConfig, shape: ModelShape, exits: tuple[int, ...], heads: int) -> tuple[str, ...]:
    head = shape.vocab * shape.hidden
    body = shape.total_params - shape.embedding_params - shape.head_params + head
    notes = [
        f"exits {', '.join(map(str, exits))} of {shape.layers}; overhead of the heads while tuning: {heads} more per labelled token, "
        f"+{100 * heads * head / body:.1f} % of the forward's products if every token has a label",
        f"memory of the losses: {_size(8 * len(exits) * shape.hidden)} of states and their gradients per labelled token of a "
        f"micro-batch, {_size(8 * config.ce.chunk * shape.vocab * (2 if config.kl else 1))} for {config.ce.chunk:,} tokens' logits "
        "and their gradient, one exit at a time"
        + (f", {_size(4 * head)} for the head's gradient" if config.trains_head else "")
        + "; none of it grows with exits x tokens x vocabulary",
    ]
    if config.schedule == "sampled":
        notes.append(f"schedule sampled trains the full depth in one step of {len(exits)} only")
    if config.schedule == "rotational":
        notes.append("schedule rotational is biased: the full depth is always on and the weights of the others change")
    if config.trunk == "frozen":
        notes.append(
            f"the full model stays as it is; a slice at exit n has n + 1 blocks ({block_params(shape):,} more)"
        )
    return tuple(notes)


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _own(block: nn.Module) -> list[nn.Parameter]:
    """A block's base parameters, without those that another method has grafted (its module says `sparsmith_grafted`) or that are there
    without effect (`sparsmith_idle` names them in their module)."""
    others = (module for module in block.modules() if getattr(module, "sparsmith_grafted", False))
    left = {id(p) for module in others for p in module.parameters()}
    left |= {id(getattr(m, name)) for m in block.modules() for name in getattr(m, "sparsmith_idle", ())}
    return [p for p in block.parameters() if id(p) not in left]


def _active(config: SoftConfig, omega: dict[int, float], layers: int, draw: int, step: int) -> dict[int, float]:
    if config.frozen_trunk and config.schedule == "sandwich":  # the full depth has no loss: one inner exit, unbiased
        one = sorted(omega)[draw]
        return {one: len(omega) * omega[one]}
    return active_weights(
        omega, config.schedule, draw=draw, step=step, rotation=config.rotation, half=config.sandwich_weights == "half"
    )


def _states(
    model: nn.Module,
    config: SoftConfig,
    batch: Batch,
    depths: list[int],
    select: Any,
    kept: Any,
    kl: bool,
    layers: int,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """The normed states of this micro-batch's exits, and that of the full depth, detached, where they learn from it."""
    if config.trunk == "frozen":
        return tail_states(model, batch, depths, select, kl)
    if config.arm == "ict":
        with torch.no_grad():
            return trunk_states(model, batch, depths, select), None
    states = trunk_states(model, batch, depths, select, kept)
    return states, states[layers].detach() if kl and layers in states else None


def _exit(
    model: nn.Module, config: SoftConfig, depth: int, weight: float, hidden: Tensor, forward: Callable[[Tensor], Tensor]
) -> Exit:
    """Args: forward: the model's own head, without its hooks."""
    owned = parts.exits_of(model).get(depth)
    head: Any = anatomy.head(model)
    if owned is not None and "head" in owned:
        head, hidden = owned["head"], hidden.to(next(owned["head"].parameters()).dtype)
        forward = head.forward
    cap = anatomy.softcap(model)

    def logits(h: Tensor) -> Tensor:
        return forward(h) if cap is None else (forward(h) / cap).tanh() * cap

    trained = tuple(p for p in head.parameters() if p.requires_grad)
    weight_only = (head.weight,) if isinstance(head, nn.Linear) and head.bias is None else ()
    return Exit(depth, weight, hidden, logits, trained, weight_only)


def _check_bare(model: nn.Module) -> None:
    head = anatomy.head(model)
    if not isinstance(head, nn.Linear) or head.bias is not None or anatomy.softcap(model) is not None:
        raise ProofError(
            "soft.ce.impl",
            "`torch` with a head that is more than one matrix",
            "a bare linear head",
            "Set ce.impl auto.",
        )


def _swap_head(view: Any, head: nn.Module) -> None:
    row = anatomy.anatomy_of(view)
    base = anatomy.base_of(view)
    base._modules[row.head] = head
    for holder in {id(base): base, id(view): view}.values():
        holder.config = copy.copy(holder.config)
        holder.config.tie_word_embeddings = False
        if isinstance(getattr(holder, "all_tied_weights_keys", None), dict):
            holder.all_tied_weights_keys = {}


SOFT = SoftMethod()
