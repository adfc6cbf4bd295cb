"""FineGates behind the contract of a method. What depends on the layout of the gates is asked of it (`layout.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from sparsmith import anatomy, ranks
from sparsmith.errors import MethodError
from sparsmith.methods.base import Batch, CraftContext, LossTerm, Method, MethodConfig, MethodPlan
from sparsmith.methods.finegates import biases, deci, exported, planning
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import Gate, GatedLinear, GateState, draw_noise, gates_of, silence, state_of
from sparsmith.methods.finegates.layout import Layout
from sparsmith.methods.finegates.paper import PaperLayout
from sparsmith.methods.finegates.prune import is_slim
from sparsmith.methods.finegates.structured import StructuredLayout

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape
    from sparsmith.methods.base import LoraSettings

ROLE, CLASSIFIER = "gate", "classifier"
_LAYOUTS: dict[str, Layout] = {"paper": PaperLayout(), "structured": StructuredLayout()}


def layout_of(config: FineGatesConfig) -> Layout:
    """The one that answers for these settings."""
    return _LAYOUTS[config.layout]


class FineGatesMethod(Method):
    name: ClassVar[str] = "finegates"
    title: ClassVar[str] = "FineGates: learned gates cut the model to size"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.12951"
    config_class: ClassVar[type[MethodConfig]] = FineGatesConfig
    reads_batches: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = FineGatesConfig.tasks

    # what it is

    def plan(self, config: FineGatesConfig, anatomy: Anatomy, shape: ModelShape) -> MethodPlan:
        found = layout_of(config).plan(config, anatomy, shape)
        others = {biases.ROLE: biases.bias_count(config, anatomy, shape), CLASSIFIER: shape.classifier_params}
        return replace(found, trained={**found.trained, **{role: count for role, count in others.items() if count}})

    def craft(self, model: nn.Module, config: FineGatesConfig, context: CraftContext) -> nn.Module:
        if not biases.is_classifier(model) and config.changed("head_lr"):
            raise MethodError(
                "finegates.head_lr",
                f"`{config.head_lr:g}`, which has no effect here",
                "a classifier (model.task seq_cls)",
                "Remove `head_lr`.",
            )
        if not config.cuts:
            return model
        exported.refuse_slim(model)
        if anatomy.base_of(model) is model:
            anatomy.probe(model)
        layout = layout_of(config)
        layout.check(config, anatomy.anatomy_of(model), anatomy.shape_of(model))
        if biases.wants_biases(config, biases.is_classifier(model)):
            biases.check_biases(model)
        layout.graft(model, config, context.seed)
        return model

    def roles(self, model: nn.Module, config: FineGatesConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
        head = anatomy.classifier_tensors(model) if biases.is_classifier(model) else []
        if not gates_of(model):
            return {CLASSIFIER: head} if head else {}
        found = {ROLE: layout_of(config).roles(model, config), CLASSIFIER: head}
        if biases.wants_biases(config, biases.is_classifier(model)):
            found[biases.ROLE] = biases.biases_of(model)
        return {role: tensors for role, tensors in found.items() if tensors}

    def wanted_roles(self, config: FineGatesConfig) -> tuple[str, ...]:
        gates = (ROLE,) if layout_of(config).wants_gates(config) else ()
        return (*gates, biases.ROLE) if config.train_bias is True else gates

    def rates(self, config: FineGatesConfig) -> Mapping[str, float]:
        return {ROLE: config.gates.lr, CLASSIFIER: config.head_lr}

    def lora(self, config: FineGatesConfig, shape: ModelShape | None = None) -> LoraSettings | None:
        return config.lora

    def unsharded(self, config: FineGatesConfig) -> str:
        return "whose budget reads the gates of all blocks at once" if config.cuts else ""

    def final_from(self, config: FineGatesConfig, total_steps: int) -> int:
        return layout_of(config).final_from(config, total_steps)

    def still_until(self, config: FineGatesConfig, total_steps: int) -> int:
        return layout_of(config).still_until(config, total_steps)

    # the steps

    def check_steps(self, config: FineGatesConfig, total_steps: int) -> None:
        if config.cuts:
            layout_of(config).check_steps(config, total_steps)

    def on_step(self, model: nn.Module, config: FineGatesConfig, step: int, total_steps: int) -> None:
        state = state_of(model)
        if state is not None:
            state.step, state.micro, state.rank = step, 0, ranks.rank()
            layout_of(config).on_step(model, config, state, total_steps)

    def before_forward(self, model: nn.Module, config: FineGatesConfig, batch: Batch) -> None:
        state = state_of(model)
        if state is None or not model.training:
            return
        sigma = layout_of(config).noise_sigma(config)
        if state.learning and sigma > 0:
            draw_noise(model, sigma)
        elif state.micro == 0:
            silence(model)
        state.micro += 1

    def loss_terms(self, model: nn.Module, config: FineGatesConfig, batch: Batch) -> dict[str, LossTerm]:
        state = state_of(model)
        return {} if state is None else layout_of(config).loss_terms(model, config, state)

    def after_forward(self, model: nn.Module, config: FineGatesConfig) -> None:
        layout_of(config).after_forward(model)

    def wanted_terms(self, config: FineGatesConfig) -> tuple[str, ...]:
        return layout_of(config).wanted_terms(config)

    def metrics(self, model: nn.Module, config: FineGatesConfig) -> dict[str, Any]:
        return layout_of(config).metrics(model, config)

    def health(self, metrics: Mapping[str, Any]) -> str:
        words = (layout.words(metrics) for layout in _LAYOUTS.values())  # the paper's figures are known by their names
        return next(filter(None, words), "")

    # the result

    def settle(self, model: nn.Module, config: FineGatesConfig) -> nn.Module:
        """The hard choice, where training has not come to it yet."""
        layout_of(config).settle(model, config)
        return model

    def form(self, model: nn.Module, config: FineGatesConfig, asked: str) -> str:
        return layout_of(config).form(model, asked) if gates_of(model) else ""

    def prune(self, model: nn.Module, config: FineGatesConfig, form: str = "auto") -> nn.Module:
        return layout_of(config).prune(model, config, form) if gates_of(model) else model

    def tables(self, model: nn.Module, config: FineGatesConfig, form: str) -> Mapping[str, Any]:
        return layout_of(config).tables(model, form) if gates_of(model) else {}

    def cautions(self, model: nn.Module, config: FineGatesConfig) -> tuple[str, ...]:
        return exported.cautions(model) if config.cuts else ()

    def foreign(self, model: nn.Module, config: FineGatesConfig, kind: str) -> Mapping[str, Any]:
        return {deci.FILE: deci.deci_config(model)} if kind == "deci" and config.cuts else {}

    def inactive(self, model: nn.Module, config: FineGatesConfig, anatomy: Anatomy, shape: ModelShape) -> int:
        """None: what is closed is gone, and the plan of a cut model would be the plan of a second cut."""
        return 0

    def standalone_sources(self) -> tuple[str, ...]:
        return ("sparsmith.methods.wrapped", "sparsmith.methods.finegates.modeling")

    def settled_config(self, config: FineGatesConfig, base_config: Any) -> Any:
        return planning.settled_config(config, base_config)

    def settled_note(self, config: FineGatesConfig) -> str:
        return planning.settled_note(config)

    def state(self, model: nn.Module, config: FineGatesConfig) -> dict[str, Tensor]:
        """Logits, scales and choices, the budget's lambda, what was watched, and trained biases: a cut run goes on to the same bits."""
        trained = self.roles(model, config)
        apart = (*trained.get(biases.ROLE, ()), *trained.get(CLASSIFIER, ()))
        found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in apart}
        parts = {
            Gate: ("logit", "scale", "kept", "settled", "pull"),
            GateState: ("dual", "sigma", "aim", "started"),
            GatedLinear: ("input_sum", "input_square", "input_count"),
        }
        for name, module in model.named_modules():
            for kind, own in parts.items():
                if isinstance(module, kind):
                    found.update({f"{name}.{part}": getattr(module, part).detach() for part in own})
        return found

    def cut(self, view: Any, config: FineGatesConfig, depth: int, layers: int) -> MethodConfig | None:
        """The blocks keep their gates, or each its size; of a settled model of one shape nothing of the method is left."""
        if is_slim(view):
            exported.cut_sizes(view, depth)
            return config
        return config if gates_of(view) else None


FINEGATES = FineGatesMethod()
