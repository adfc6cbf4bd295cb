"""Tuning: the objective, the Tuner and its callbacks."""

from sparsmith.training.objective import Objective
from sparsmith.training.tuner import Tuner

__all__ = ["Objective", "Tuner"]
