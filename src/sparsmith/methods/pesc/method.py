"""PESC behind the contract of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.errors import MethodError
from sparsmith.methods import route_health as health
from sparsmith.methods.base import Batch, CraftContext, LossTerm, Method, MethodConfig, MethodPlan, ModuleChange
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.pesc.layers import PescSettings, adapters_of
from sparsmith.ops.adapter_experts import grouped_supported
from sparsmith.seeds import stream_seed

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape
    from sparsmith.methods.base import LoraSettings
    from sparsmith.methods.pesc.modeling import SparsmithPescForCausalLM


class PescMethod(Method):
    name: ClassVar[str] = "pesc"
    title: ClassVar[str] = "PESC: experts as adapters on a shared FFN"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.02731"
    config_class: ClassVar[type[MethodConfig]] = PescConfig

    def plan(self, config: PescConfig, anatomy: Anatomy, shape: ModelShape) -> MethodPlan:
        if not config.has_adapters:
            return MethodPlan(changes=(), added={}, notes=(f"control {config.control}: no experts, LoRA alone",))
        experts, active, dim, scale = config.expert_sizes(shape.hidden)
        _check_widths(config, shape.hidden, dim)
        blocks = config.block_indices(shape.layers)
        added = config.num_params(shape)
        trained = {role: n for role, n in added.items() if role != "router" or config.trains_router}
        inactive = sum(added.values()) - config.num_active_params(shape)
        if experts == 1:
            what = f"FFN -> FFN + one adapter (r {dim}, scale {scale:g})"
        else:
            what = f"FFN -> shared FFN + {experts} adapters (r {dim}, scale {scale:g}), top-{active} {config.router} router"
        change = ModuleChange(f"{anatomy.blocks}.{_range(blocks)}.{anatomy.ffn}", what, len(blocks))
        masked = shape.hidden + experts * (dim + 1)
        grouped = active * (shape.hidden + 3 * dim)
        floats = {"masked": masked, "grouped": grouped}.get(config.path, max(masked, grouped))
        notes = _notes(config)
        if config.path == "auto" and not grouped_supported(shape.hidden, dim):
            notes += (f"path auto is `masked`: grouped products need a hidden size that 8 divides, not {shape.hidden}",)
        return MethodPlan(
            changes=(change,),
            added=added,
            inactive=inactive,
            trained=trained,
            flops_forward=config.flops_per_token(shape),
            activation_floats=len(blocks) * floats,
            notes=notes,
        )

    def craft(self, model: nn.Module, config: PescConfig, context: CraftContext) -> nn.Module:
        if not config.has_adapters:
            return model
        _check_model(model)
        anatomy.probe(model)
        pesc = resolve(config, model, context.seed)
        base_config = model.config
        # the model class brings the library's generation code: seconds that planning need not pay
        from sparsmith.methods.pesc.modeling import SparsmithPescConfig, SparsmithPescForCausalLM

        crafted = SparsmithPescForCausalLM(
            SparsmithPescConfig(base_config=base_config, pesc=pesc.as_dict(), dtype=base_config.dtype), base=model
        )
        crafted.config.architectures = [type(crafted).__name__]
        crafted.train(model.training)
        return crafted

    def roles(self, model: nn.Module, config: PescConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
        table: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, adapters in adapters_of(model):
            for part in ("down", "up"):
                table.setdefault("adapter", []).append((f"{name}.{part}", getattr(adapters, part)))
            if adapters.router is not None and config.trains_router:
                table.setdefault("router", []).append((f"{name}.router.weight", adapters.router.weight))
        return table

    def wanted_roles(self, config: PescConfig) -> tuple[str, ...]:
        if not config.has_adapters:
            return ()
        return ("adapter", "router") if config.trains_router else ("adapter",)

    def state(self, model: nn.Module, config: PescConfig) -> dict[str, Tensor]:
        """Adapters, and the router also where it is frozen."""
        held = {}
        for name, adapters in adapters_of(model):
            held.update({f"{name}.{part}": p.detach() for part, p in adapters.named_parameters()})
        return held

    def before_forward(self, model: nn.Module, config: PescConfig, batch: Batch) -> None:
        if config.has_adapters:
            context = _crafted(model).route_context
            context.hand(batch.token_mask, batch.input_ids, batch.position_ids, batch.domain)

    def loss_terms(self, model: nn.Module, config: PescConfig, batch: Batch) -> dict[str, LossTerm]:
        if not config.trains_router:
            return {}
        context = _crafted(model).route_context
        losses = context.losses(_crafted(model).settings.balance_norm, over_ranks=True)
        for name, value in losses.items():
            context.note(name, value)
        weights = {"balance": config.balance_weight, "router_z": config.z_weight}
        return {
            name: LossTerm(losses[name], weight, over_ranks=True)
            for name, weight in weights.items()
            if weight and name in losses
        }

    def wanted_terms(self, config: PescConfig) -> tuple[str, ...]:
        weights = {"balance": config.balance_weight, "router_z": config.z_weight}
        return tuple(name for name, weight in weights.items() if weight)

    def after_forward(self, model: nn.Module, config: PescConfig) -> None:
        if not config.has_adapters:
            return
        context = _crafted(model).route_context
        if config.trains_router:
            grads = [a.router.weight.grad for _, a in adapters_of(model) if a.router is not None]
            context.router_grads = [g.norm() for g in grads if g is not None] or context.router_grads
        context.clear()

    def metrics(self, model: nn.Module, config: PescConfig) -> dict[str, Any]:
        if not config.has_adapters or config.control != "none":
            return {}
        figures = health.read(_crafted(model).route_context)
        paths = [adapters.last_path for _, adapters in adapters_of(model)]
        return {**figures, "table/paths": paths} if figures and all(paths) else figures

    def health(self, metrics: Mapping[str, Any]) -> str:
        return health.words(metrics)

    def cut(self, view: Any, config: PescConfig, depth: int, layers: int) -> PescConfig | None:
        """The experts of the first blocks. The view's settings and config become its own; the modules stay the model's."""
        if not config.has_adapters or depth == layers:
            return config
        kept = tuple(index for index in config.block_indices(layers) if index < depth)
        crafted = _crafted(view)
        crafted.settings = replace(crafted.settings, layers=kept)
        crafted.config.pesc = crafted.settings.as_dict()
        if not kept:
            return None
        return config if config.layers == "all" else config.model_copy(update={"layers": kept})

    def fold_scale(self, model: nn.Module, config: PescConfig) -> PescConfig:
        """U <- s U, then s = 1: for runtimes that know no scale."""
        if not config.has_adapters:
            return config
        for _, adapters in adapters_of(model):
            adapters.up.data.mul_(adapters.settings.adapter_scale)
            adapters.settings = replace(adapters.settings, adapter_scale=1.0)
        crafted = _crafted(model)
        crafted.settings = replace(crafted.settings, adapter_scale=1.0)
        crafted.config.pesc["adapter_scale"] = 1.0
        return config.model_copy(
            update={"adapter_scale": float(config.top_k if config.control == "single_adapter" else 1)}
        )

    def standalone_sources(self) -> tuple[str, ...]:
        return (
            "sparsmith.ops.routing",
            "sparsmith.ops.balance",
            "sparsmith.ops.adapter_experts",
            "sparsmith.ops.cost",
            "sparsmith.ops.route_context",
            "sparsmith.methods.pesc.layers",
            "sparsmith.methods.wrapped",
            "sparsmith.methods.pesc.modeling",
        )

    def settled_config(self, config: PescConfig, base_config: Any) -> Any:
        if not config.has_adapters:
            return base_config
        raise MethodError(
            "methods: pesc",
            "experts, whose settled model is no stock dense one",
            "a settled model that can be crafted again, where another stage follows",
            "Let pesc be in the last stage; its controls equal_lora and dense_lora leave a dense model.",
        )

    def lora(self, config: PescConfig, shape: ModelShape | None = None) -> LoraSettings | None:
        return config.lora_for(shape)


def _crafted(model: nn.Module) -> SparsmithPescForCausalLM:
    return cast("SparsmithPescForCausalLM", model)


def resolve(config: PescConfig, model: nn.Module, seed: int) -> PescSettings:
    """The settings as built: no `auto` but the path, which depends on the number of tokens."""
    row, shape = anatomy.of(model.config), anatomy.shape_of(model.config)
    experts, active, dim, scale = config.expert_sizes(shape.hidden)
    _check_widths(config, shape.hidden, dim)
    norm = config.router_input_norm
    if norm == "auto":
        norm = "rms" if row.ffn_reads == "residual" else "none"
    single = config.control == "single_adapter"
    return PescSettings(
        num_experts=experts,
        top_k=active,
        adapter_dim=dim,
        adapter_scale=scale,
        layers=config.block_indices(shape.layers),
        activation=config.adapter_activation,
        dropout=config.adapter_dropout,
        router="dense" if single else config.router,
        router_trainable=config.trains_router,
        router_input_norm=norm,
        top1_gate=config.top1_gate,
        path=config.path,
        route_early=config.route_early,
        balance_alpha=config.balance_weight,
        balance_norm=config.balance_norm,
        router_z_coef=config.z_weight,
        seed=stream_seed(seed, "pesc"),
        blocks=row.blocks,
        ffn=row.ffn,
    )


def _check_widths(config: PescConfig, hidden: int, dim: int) -> None:
    if config.path == "grouped" and not grouped_supported(hidden, dim):
        raise MethodError(
            "pesc.path",
            f"`grouped` with hidden size {hidden} and adapter_dim {dim}",
            "both multiples of 8, and torch.nn.functional.grouped_mm",
            "Use `auto` or `masked`.",
        )


def _check_model(model: nn.Module) -> None:
    row = anatomy.of(model.config)
    if any(True for _ in adapters_of(model)):
        raise MethodError("pesc", "a model with experts already", "a dense model", "Craft the base once.")
    if not hasattr(model, row.head):
        raise MethodError(
            "pesc", f"{type(model).__name__} without `{row.head}`", "a causal language model", "Use task causal_lm."
        )


def _notes(config: PescConfig) -> tuple[str, ...]:
    notes = []
    if config.control == "none" and config.router == "learned" and config.top_k == 1 and config.top1_gate == "none":
        notes.append("top_k 1 with top1_gate none: the task loss never reaches the router")
    if config.has_router and not config.router_trainable:
        notes.append("the router stays as it starts (a control)")
    if config.control == "single_adapter":
        notes.append("control single_adapter: the router's and the balance settings are not used")
    return tuple(notes)


def _range(blocks: tuple[int, ...]) -> str:
    if len(blocks) > 1 and blocks == tuple(range(blocks[0], blocks[-1] + 1)):
        return f"{{{blocks[0]}..{blocks[-1]}}}"
    return str(blocks[0]) if len(blocks) == 1 else "{" + ",".join(map(str, blocks)) + "}"


PESC = PescMethod()
