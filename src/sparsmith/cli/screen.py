"""What the command line prints: results on stdout, faults on stderr; with `--json` one JSON document on stdout, whatever happens."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sparsmith import ranks
from sparsmith.errors import RecipeErrors, SparsmithError

_UNPRINTABLE = dict.fromkeys(range(32)) | {127: None} | {ord("\n"): " ", ord("\t"): " "}

# exit codes of faults in what was given: all processes of a machine meet them alike, and one of them tells
_OF_THE_INPUT = range(2, 7)


@dataclass
class Screen:
    """The two global flags, and where results go."""

    json: bool = False
    debug: bool = False
    out: TextIO | None = None

    def start(self, arguments: list[str]) -> None:
        """Read the global flags wherever they stand. With `--json`, everything that others print goes to stderr."""
        flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
        self.json, self.debug = "--json" in flags, "--debug" in flags
        self.out = sys.stdout
        if self.json:
            sys.stdout = sys.stderr

    def stop(self) -> None:
        if self.out is not None:
            self.out.flush()
            sys.stdout, self.out = self.out, None

    def show(self, result: Any, label: str = "result") -> None:
        """Print a verb's result: a path, text, a dictionary, or an object with `as_dict` (or `to_json`) that rich can
        print (or with a `table`)."""
        if not ranks.is_first():
            return
        if self.json:
            self._print(json.dumps(_as_data(result, label), ensure_ascii=False, default=_plain))
        elif isinstance(result, Path):
            self._print(f"{label}: {result}")
        elif isinstance(result, str):
            self._print(result)
        elif isinstance(result, dict):
            self._print("\n".join(f"{key}: {value}" for key, value in result.items()))
        else:
            from rich.console import Console

            shown = result if hasattr(result, "__rich__") or not hasattr(result, "table") else result.table()
            Console(file=self.out, width=None if sys.stdout.isatty() else 160).print(shown)

    def stream(self, text: str) -> None:
        """Print a piece of text as it comes (nothing with `--json`)."""
        if not self.json and self.out is not None:
            self.out.write(text)
            self.out.flush()

    def fault(self, error: SparsmithError) -> int:
        """Print a fault: one line each on stderr, or one document on stdout; returns the exit code."""
        if ranks.local_rank() and error.exit_code in _OF_THE_INPUT:
            return error.exit_code
        if self.json:
            self._print(json.dumps({"error": error.as_dict(), "exit_code": error.exit_code}, ensure_ascii=False))
        for each in error.faults if isinstance(error, RecipeErrors) else [error]:
            self.complain(f"{_whose()}error: {each.where}: found {each.found}; expected {each.expected}. {each.mend}")
        return error.exit_code

    def failure(self, kind: str, message: str, code: int) -> int:
        """Print a fault that is no SparsmithError; returns the exit code."""
        if self.json:
            self._print(json.dumps({"error": {"kind": kind, "message": message}, "exit_code": code}))
        self.complain(_whose() + message)
        return code

    def complain(self, line: str) -> None:
        """One line on stderr, whatever characters it holds."""
        encoding = sys.stderr.encoding or "utf-8"
        clean = line.translate(_UNPRINTABLE).encode(encoding, "backslashreplace").decode(encoding)
        print(clean, file=sys.stderr)

    def _print(self, text: str) -> None:
        print(text, file=self.out)


def _whose() -> str:
    """Which process complains, where it is not the first."""
    return "" if ranks.is_first() else f"rank {ranks.rank()}: "


def _as_data(result: Any, label: str) -> Any:
    return {label: str(result)} if isinstance(result, Path | str) else _plain(result)


def _plain(value: Any) -> Any:
    """An object as data, if it knows how; else as text."""
    for method in ("as_dict", "to_json"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value if isinstance(value, dict | list) else str(value)


def drop_output() -> None:
    """After the reader of a pipe has gone: let the interpreter's last flush go nowhere."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)


SCREEN = Screen()
