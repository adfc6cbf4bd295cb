"""Folders that others open: export with its proof and card, import of published checkpoints, verification."""

from sparsmith.exporting.folder import export
from sparsmith.exporting.report import ExportReport, SliceReports
from sparsmith.exporting.upcycled import convert
from sparsmith.exporting.verify import VerifyReport, verify

__all__ = ["ExportReport", "SliceReports", "VerifyReport", "convert", "export", "verify"]
