"""What a layout of gates answers. `method.py` asks these questions and nothing else, so each layout's story stands in one file:
`structured.py` (gates on whole units, a size to hold, a hard choice, deletion) and `paper.py` (row and column gates on every linear).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsmith.methods.base import LossTerm, MethodPlan
from sparsmith.methods.finegates.config import FineGatesConfig
from sparsmith.methods.finegates.gates import GateState

if TYPE_CHECKING:
    from sparsmith.anatomy import Anatomy, ModelShape

Roles = list[tuple[str, nn.Parameter]]


class Layout:
    """The contract; `state` is the one that lies on the model (`gates.state_of`)."""

    def plan(self, config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> MethodPlan:
        """As `Method.plan`."""
        raise NotImplementedError

    def check(self, config: FineGatesConfig, row: Anatomy, shape: ModelShape) -> None:
        """Refuse what this model cannot do."""

    def graft(self, model: nn.Module, config: FineGatesConfig, seed: int) -> None:
        """Put the gates in, in place; the function without noise stays the same to the bit."""
        raise NotImplementedError

    def roles(self, model: nn.Module, config: FineGatesConfig) -> Roles:
        """The trained tensors of the gates."""
        raise NotImplementedError

    def wants_gates(self, config: FineGatesConfig) -> bool:
        """True where gates are trained."""
        return True

    def final_from(self, config: FineGatesConfig, total_steps: int) -> int:
        """As `Method.final_from`."""
        return 0

    def still_until(self, config: FineGatesConfig, total_steps: int) -> int:
        """As `Method.still_until`."""
        return 0

    def check_steps(self, config: FineGatesConfig, total_steps: int) -> None:
        """As `Method.check_steps`."""

    def noise_sigma(self, config: FineGatesConfig) -> float:
        """Standard deviation of the noise while gates learn."""
        return config.gates.noise_sigma

    def on_step(self, model: nn.Module, config: FineGatesConfig, state: GateState, total_steps: int) -> None:
        """Called when `state.step` has been set; says by `state.learning` whether noise is drawn."""
        raise NotImplementedError

    def after_forward(self, model: nn.Module) -> None:
        """As `Method.after_forward`."""

    def loss_terms(self, model: nn.Module, config: FineGatesConfig, state: GateState) -> dict[str, LossTerm]:
        """As `Method.loss_terms`."""
        raise NotImplementedError

    def wanted_terms(self, config: FineGatesConfig) -> tuple[str, ...]:
        """As `Method.wanted_terms`."""
        raise NotImplementedError

    def metrics(self, model: nn.Module, config: FineGatesConfig) -> dict[str, Any]:
        """As `Method.metrics`."""
        raise NotImplementedError

    def words(self, metrics: Mapping[str, Any]) -> str:
        """As `Method.health`."""
        raise NotImplementedError

    def settle(self, model: nn.Module, config: FineGatesConfig) -> None:
        """Make soft choices hard, where training has not come to it yet."""
        raise NotImplementedError

    def form(self, model: nn.Module, asked: str) -> str:
        """As `Method.form`."""
        raise NotImplementedError

    def tables(self, model: nn.Module, form: str) -> Mapping[str, Any]:
        """As `Method.tables`."""
        raise NotImplementedError

    def prune(self, model: nn.Module, config: FineGatesConfig, form: str = "auto") -> nn.Module:
        """Fold what is left of the gates into plain weights and delete what is closed; no gate remains."""
        raise NotImplementedError
