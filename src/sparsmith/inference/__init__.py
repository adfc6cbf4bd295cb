"""Using a model: text, whole or streamed, at any of its depths."""

from sparsmith.inference.budget import depth_for
from sparsmith.inference.calibrate import Calibration, calibrate
from sparsmith.inference.early_exit import ExitStats
from sparsmith.inference.faults import BudgetTooSmall, ModeConflict, ProfileMissing
from sparsmith.inference.generate import Generated, generate, stream_text
from sparsmith.inference.profile import Profile
from sparsmith.inference.runner import DepthRunner
from sparsmith.inference.speculative import SelfSpeculation, SpeculationStats

__all__ = [
    "BudgetTooSmall",
    "Calibration",
    "DepthRunner",
    "ExitStats",
    "Generated",
    "ModeConflict",
    "Profile",
    "ProfileMissing",
    "SelfSpeculation",
    "SpeculationStats",
    "calibrate",
    "depth_for",
    "generate",
    "stream_text",
]
