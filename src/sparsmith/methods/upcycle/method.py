"""Upcycling behind the contract of a method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from sparsmith import anatomy
from sparsmith.anatomy.four_bit import stored
from sparsmith.errors import MethodError
from sparsmith.methods import route_health as health
from sparsmith.methods.base import Batch, CraftContext, LoraSettings, LossTerm, Method, MethodConfig, MethodPlan
from sparsmith.methods.upcycle import choosing, planning, switch
from sparsmith.methods.upcycle.build import build_sparse
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.methods.upcycle.convert import idle_names
from sparsmith.methods.upcycle.expert_products import implementation
from sparsmith.methods.upcycle.layers import (
    RouterSettings,
    context_of,
    experts_of,
    graft,
    hide_idle,
    hook,
    sparse_blocks,
    sparse_places,
    thin,
    ungraft,
    unhook,
)
from sparsmith.methods.upcycle.targets import sparse_config
from sparsmith.ops.route_context import RouteContext

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape


class UpcycleMethod(Method):
    name: ClassVar[str] = "upcycle"
    title: ClassVar[str] = "Upcycle: a mixture of experts from a dense model, tuned under the FLAN-MoE protocol"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.14705"
    config_class: ClassVar[type[MethodConfig]] = UpcycleConfig
    tasks: ClassVar[tuple[str, ...]] = UpcycleConfig.tasks
    rounding: ClassVar[float] = 1e-5
    """Weights that sum to 1 but for rounding, in every block."""
    conflicts: ClassVar[Mapping[str, str]] = {
        "pesc": "pesc keeps one FFN for all its experts; take one of the two.",
        "finegates": "Prune in a stage of its own before this one: `stages:`.",
    }

    # what it is

    def takes(self, config: UpcycleConfig) -> str:
        return config.donor if config.sparse else "dense"

    def tunes_routers(self, config: UpcycleConfig) -> bool:
        return config.sparse

    def crafted_config(self, config: UpcycleConfig, base_config: Any) -> Any:
        if config.converts:
            return sparse_config(base_config, config)
        return choosing.mean_config(base_config, config) if config.choosing else base_config

    def shifts(self, config: UpcycleConfig) -> str:
        if not config.converts:
            return "router expert_choice on a mixture of token choice" if config.choosing else ""
        asked = {
            f"copy_noise {config.copy_noise:g}": config.copy_noise > 0,
            "combine switch": config.moe.how == "switch",
        }
        return " and ".join(name for name, on in asked.items() if on)

    def plan_for(self, config: UpcycleConfig, base_config: Any) -> MethodPlan:
        return planning.plan(config, base_config, self.crafted_config(config, base_config))

    def check_stored(self, config: UpcycleConfig, dtype: str, packed: bool) -> None:
        by_lora = config.sparse and config.tune == "lora"
        if packed and not (by_lora and config.donor == "sparse"):
            found = "an nf4 base, whose weights are packed"
            raise MethodError("upcycle", found, "plain weights", "Take quant none.")
        if packed and not config.allow_16bit_experts:
            raise MethodError(
                "upcycle.allow_16bit_experts",
                "false, for a base in nf4",
                "true: the experts, most of the model, stay in 16 bits, because no library packs stacked experts",
                "Set it to true and look at the plan's memory, or take quant none.",
            )
        if dtype != "float32" and not by_lora:
            raise MethodError(
                "upcycle.tune",
                f"`full` on a base in {dtype}",
                "a base in float32: small updates round away in fewer bits",
                "Set model.dtype to float32; the export can be rounded.",
            )

    def craft(self, model: nn.Module, config: UpcycleConfig, context: CraftContext) -> nn.Module:
        self.check_stored(config, *stored(model))
        choosing.refuse_wrapped(model)
        if not config.sparse:
            return model
        if config.converts:
            anatomy.probe(model)
            model = build_sparse(model, config, context.seed)
        if switch.is_switch(model):
            switch.graft(model, config)
            return model
        if config.choosing:
            quiet(model, config)
            thin(model, config.moe.expert_dropout)
            return choosing.wrapped(model, config)
        _check_router(model, config)
        settings = RouterSettings(
            combine=config.moe.how,
            second_expert_drop=config.moe.second_expert_drop,
            capacity_factor=config.moe.capacity_factor,
            jitter=config.moe.jitter,
        )
        routes = RouteContext()
        graft(model, settings, config.moe.expert_dropout, routes)
        hook(model, routes, config.moe.loss_weights, config.moe.balance_norm)
        hide_idle(model, idle_names(model.config))
        quiet(model, config)
        for _, ffn in sparse_blocks(model):
            router = getattr(ffn, anatomy.anatomy_of(model).router)
            if config.moe.trains_gate and not router.weight.is_meta:
                router.weight.data = router.weight.data.float()
        return model

    def while_proven(self, model: nn.Module, config: UpcycleConfig) -> AbstractContextManager[None]:
        if config.sparse and switch.is_switch(model):
            return switch.as_stored(model)
        return choosing.seeing_ahead(model) if config.choosing else nullcontext()

    def roles(self, model: nn.Module, config: UpcycleConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
        kinds = _kinds(model)
        wanted = {
            "router": config.sparse and config.moe.trains_gate,
            "expert": config.sparse and config.tune == "full" and config.moe.trains_experts,
            "dense": config.trains_dense,
        }
        table: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in model.named_parameters():
            role = kinds(name)
            if wanted.get(role) and parameter.numel():
                table.setdefault(role, []).append((name, parameter))
        return table

    def wanted_roles(self, config: UpcycleConfig) -> tuple[str, ...]:
        if not config.sparse:
            return ("dense",)
        trained = {
            "router": config.moe.trains_gate,
            "expert": config.tune == "full" and config.moe.trains_experts,
            "dense": config.trains_dense,
        }
        return tuple(role for role, on in trained.items() if on)

    def asks_lora(self, config: UpcycleConfig) -> bool:
        return config.sparse and config.tune == "lora"

    def adapts_experts(self, config: UpcycleConfig) -> bool:
        return self.asks_lora(config)

    def lora(self, config: UpcycleConfig, shape: ModelShape | None = None) -> LoraSettings | None:
        return LoraSettings(**config.lora.model_dump()) if self.asks_lora(config) else None

    def goes_alone(self, config: UpcycleConfig) -> str:
        return "experts that choose their tokens, whose model is of a type of its own" * config.choosing

    def trains_base(self, config: UpcycleConfig) -> bool:
        return config.trains_dense

    # the losses

    def before_forward(self, model: nn.Module, config: UpcycleConfig, batch: Batch) -> None:
        if config.sparse and switch.is_switch(model):
            switch.routes_of(model).hand(batch)
        elif config.sparse:
            context_of(model).hand(batch.token_mask, batch.input_ids, batch.position_ids, batch.domain)

    def loss_terms(self, model: nn.Module, config: UpcycleConfig, batch: Batch) -> dict[str, LossTerm]:
        weights = config.moe.loss_weights if config.sparse else {}
        if not weights:
            return {}
        context = _routes_of(model)
        losses = context.losses(config.moe.balance_norm, over_ranks=True)
        for name, value in losses.items():
            context.note(name, value)
        return {n: LossTerm(losses[n], weight, over_ranks=True) for n, weight in weights.items() if n in losses}

    def wanted_terms(self, config: UpcycleConfig) -> tuple[str, ...]:
        return tuple(config.moe.loss_weights) if config.sparse else ()

    def after_forward(self, model: nn.Module, config: UpcycleConfig) -> None:
        if not config.sparse:
            return
        context, router = _routes_of(model), anatomy.anatomy_of(model).router
        if config.moe.trains_gate:
            grads = (
                switch.router_grads(model)
                if switch.is_switch(model)
                else [getattr(ffn, router).weight.grad for _, ffn in sparse_blocks(model)]
            )
            context.router_grads = [g.norm() for g in grads if g is not None] or context.router_grads
        if config.choosing:
            choosing.follow(context)
        context.clear()

    def metrics(self, model: nn.Module, config: UpcycleConfig) -> dict[str, Any]:
        if not config.sparse:
            return {}
        own = choosing.figures(context_of(model)) if config.choosing else {}
        return {**health.read(_routes_of(model)), **own}

    def health(self, metrics: Mapping[str, Any]) -> str:
        return health.words(metrics) + choosing.words(metrics)

    def warnings(self, metrics: Mapping[str, Any]) -> Mapping[str, str]:
        return choosing.warnings(metrics)

    # the result

    def settle(self, model: nn.Module, config: UpcycleConfig) -> nn.Module:
        """Routers and experts are the family's own again, and the config says how a stock trainer would balance them."""
        if config.sparse and switch.is_switch(model):
            switch.settle(model, config)
        elif config.choosing:
            ungraft(model)
        elif config.sparse:
            unhook(model)
            ungraft(model)
            restore(model, config)
            row = anatomy.anatomy_of(model)
            for _, ffn in sparse_blocks(model):
                router, experts = getattr(ffn, row.router), experts_of(ffn, row.experts)
                router.weight.data = router.weight.data.to(next(experts.parameters()).dtype)
        return model

    def form(self, model: nn.Module, config: UpcycleConfig, asked: str) -> str:
        if config.choosing:
            choosing.refuse_stock(asked)
        return ""

    def standalone_sources(self) -> tuple[str, ...]:
        return _SOURCES

    def state(self, model: nn.Module, config: UpcycleConfig) -> dict[str, Tensor]:
        """What trains, and the thresholds."""
        return {**super().state(model, config), **(choosing.thresholds_of(model) if config.choosing else {})}

    def keeps_type(self, model: nn.Module, config: UpcycleConfig) -> Collection[str]:
        return choosing.routers_of(model).keys()

    def settled_config(self, config: UpcycleConfig, base_config: Any) -> Any:
        if config.choosing:
            raise MethodError(
                "methods: upcycle",
                choosing.STOCK,
                "a settled model of a stock class, where another stage follows",
                "Let it be in the last stage, or take a router by which tokens choose.",
            )
        return self.crafted_config(config, base_config)

    def cut(self, view: Any, config: UpcycleConfig, depth: int, layers: int) -> UpcycleConfig | None:
        """The blocks that are left are a mixture, or none of them is. What is cut out is described as it is, not as it was made."""
        if not config.sparse:
            return config
        if not sparse_blocks(view):
            return None
        plain = {name: UpcycleConfig.model_fields[name].default for name in _CONVERTING}
        return config.model_copy(update={**plain, "donor": "sparse"}) if config.converts else config

    def inactive(self, model: nn.Module, config: UpcycleConfig, anatomy: Anatomy, shape: ModelShape) -> int:
        return shape.sparse.inactive_params if shape.sparse else 0

    def cautions(self, model: nn.Module, config: UpcycleConfig) -> tuple[str, ...]:
        said = []
        if config.converts:
            said.append(
                "Upcycled from a dense model (sparse upcycling, arXiv 2212.05055) and tuned under the protocol of FLAN-MoE, "
                "whose own models were pre-trained sparse: the pair is an extension of this project, not the paper's method."
            )
        if config.sparse and config.moe.capacity_factor is not None:
            said.append("Trained with a capacity; here nothing is dropped.")
        if config.choosing:
            said.append(choosing.CAUTION)
        if config.sparse and switch.is_switch(model):
            said.append(switch.CAUTION)
        return tuple(said)

    def files_config(self, model: nn.Module, config: UpcycleConfig) -> Mapping[str, Any]:
        """Both spellings of what readers of different ages look for (spec F9)."""
        if not config.sparse or config.choosing or switch.is_switch(model):
            return {}
        made: Any = model.config
        sparse = anatomy.sparse_shape(made)
        assert sparse is not None
        said: dict[str, Any] = {"num_experts": sparse.experts, "num_local_experts": sparse.experts}
        rope = getattr(made, "rope_parameters", None)
        if isinstance(rope, dict) and "rope_theta" in rope:
            said["rope_theta"] = rope["rope_theta"]
            if rope.get("rope_type", "default") != "default":
                said["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return said


_SOURCES = (
    "sparsmith.errors",
    "sparsmith.ops.routing",
    "sparsmith.ops.balance",
    "sparsmith.ops.token_choice",
    "sparsmith.ops.expert_choice",
    "sparsmith.ops.route_context",
    "sparsmith.methods.upcycle.expert_choice",
    "sparsmith.methods.wrapped",
    "sparsmith.methods.upcycle.modeling",
)
"""What a folder whose experts choose brings along; all other models of this method are stock ones."""
_CONVERTING = ("experts", "top_k", "layers", "copy_noise", "router_init_std", "target")


def _routes_of(model: nn.Module) -> Any:
    """What counts the routes of a grafted model."""
    return switch.routes_of(model) if switch.is_switch(model) else context_of(model)


def _kinds(model: nn.Module) -> Any:
    """Name of a parameter -> `router`, `expert`, `dense`, or `idle` for what is there without effect."""
    row, base = anatomy.anatomy_of(model), anatomy.base_of(model)
    config: Any = base.config
    within = "" if base is model else "base."
    routers, experts = set(), []
    idle = frozenset(within + name for name in idle_names(config)) if row.experts else frozenset()
    for _, path, ffn in sparse_places(model):
        home = f"{within}{path}"
        routers |= {f"{home}.{row.router}.{name}" for name, _ in getattr(ffn, row.router).named_parameters()}
        experts += [f"{home}.{row.experts}.", f"{home}.shared_expert"]
    prefixes = tuple(experts)

    def kind(name: str) -> str:
        if name in idle:
            return "idle"
        if name in routers:
            return "router"
        return "expert" if name.startswith(prefixes) else "dense"

    return kind


def quiet(model: nn.Module, config: UpcycleConfig) -> None:
    """The library's own balance loss is off while ours is on, also where a trainer asks for router logits; experts run as asked."""
    made: Any = model.config
    made.router_aux_loss_coef, made.output_router_logits = 0.0, False
    model.router_aux_loss_coef = 0.0  # type: ignore[assignment]
    if hasattr(made, "router_jitter_noise"):
        made.router_jitter_noise = 0.0  # the library's noise reaches the experts too (spec F3)
        for _, ffn in sparse_blocks(model):
            ffn.jitter_noise = 0.0  # read from the config once, when the block was built
    asked = config.moe.experts_impl
    made._experts_implementation = asked if config.choosing else implementation(asked)


def restore(model: nn.Module, config: UpcycleConfig) -> None:
    """What a stock trainer shall find."""
    made: Any = model.config
    made.router_aux_loss_coef = model.router_aux_loss_coef = config.moe.balance_coef  # type: ignore[assignment]
    made._experts_implementation = config.moe.experts_impl


def _check_router(model: nn.Module, config: UpcycleConfig) -> None:
    """The settings agree with what the checkpoint is."""
    made: Any = model.config
    k, normed = made.num_experts_per_tok, getattr(made, "norm_topk_prob", True)
    wanted = {"top1": 1, "top2": 2}.get(config.moe.router)
    if wanted not in (None, k) or (config.moe.router == "topk" and k == 1):
        fitting = {1: "top1", 2: "top2"}.get(k, "topk")
        raise MethodError(
            "upcycle.moe.router",
            f"`{config.moe.router}`",
            f"`{fitting}`, as a token takes {k} experts in this model",
            f"Write `moe: {{router: {fitting}}}`.",
        )
    if normed != (config.moe.how != "switch"):
        raise MethodError(
            "upcycle.moe.combine",
            f"`{config.moe.how}` for a model whose config says norm_topk_prob {str(bool(normed)).lower()}",
            "`renorm` or `straight_through`" if normed else "`switch`",
            "Write the combine that the model was made with.",
        )


UPCYCLE = UpcycleMethod()
