"""One self-contained HTML page about one run or several, and the figures on it."""

from __future__ import annotations

from sparsmith.reporting.page import write_report
from sparsmith.reporting.stages import write_stages_report

__all__ = ["write_report", "write_stages_report"]
