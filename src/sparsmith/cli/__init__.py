"""The command line: one file per verb; each reads, validates, calls one function of `sparsmith.app`, prints."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code (docs/exit-codes.md)."""
    from sparsmith.cli.entry import run

    return run(argv)


__all__ = ["main"]
