"""What can be wrong with a request for text."""

from __future__ import annotations

from sparsmith.errors import EnvironmentFault, UsageError


class ModeConflict(UsageError):
    """More than one way of generating asked for, or a setting of a way that is not asked for."""


class BudgetTooSmall(UsageError):
    """No depth of the model is as cheap as asked."""


class ProfileMissing(EnvironmentFault):
    """No measured time per token for this device, number type and batch size."""
