"""The verbs put together, and every way out of a command turned into one line and an exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from sparsmith import __version__
from sparsmith.cli import (
    bench,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    plan,
    protocol,
    report,
    tune,
    verify,
)
from sparsmith.cli.options import Debug, Json
from sparsmith.cli.screen import SCREEN, drop_output
from sparsmith.errors import SparsmithError

_USAGE, _INTERNAL, _BROKEN_PIPE, _INTERRUPTED = 2, 70, 141, 130

app = typer.Typer(
    name="sparsmith",
    help="Craft one dense language-model checkpoint into a sparse one while instruction-tuning it.",
    rich_markup_mode=None,  # rich help costs 0.3 s of imports
    pretty_exceptions_enable=False,
    add_completion=False,
)
_VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "plan": plan.plan,
    "tune": tune.tune,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "export": export.export,
    "report": report.report,
    "protocol": protocol.protocol,
    "bench": bench.bench,
    "verify": verify.verify,
    "doctor": doctor.doctor,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)
app.add_typer(data.app, name="data")
app.add_typer(import_.app, name="import")


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    if version:
        SCREEN.show(__version__, "version")
    elif context.invoked_subcommand is None:
        SCREEN.show(context.get_help(), "help")


def run(argv: list[str] | None = None) -> int:
    """One command line -> exit code. No exception leaves."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # on CPUs with AVX512-BF16 its import tells of a kernel that is not installed, and that no forward here would use (anatomy.four_bit)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    SCREEN.start(arguments)
    try:
        code = _invoke(arguments)
        SCREEN.stop()
        return code
    except BrokenPipeError:
        drop_output()
        return _BROKEN_PIPE
    finally:
        if SCREEN.out is not None:
            sys.stdout, SCREEN.out = SCREEN.out, None


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("sparsmith", arguments) as context:
            result = command.invoke(context)
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except SparsmithError as error:
        if SCREEN.debug:
            traceback.print_exc()
        return SCREEN.fault(error)
    except typer.TyperException as error:
        context_path = getattr(getattr(error, "ctx", None), "command_path", "sparsmith")
        message = f"error: {error.format_message().rstrip('.')}. Run `{context_path} --help`."
        return SCREEN.failure("UsageError", message, getattr(error, "exit_code", _USAGE))
    except (KeyboardInterrupt, typer.Abort):
        return SCREEN.failure("Interrupted", "interrupted", _INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as error:
        if SCREEN.debug:
            traceback.print_exc()
        message = (
            f"internal error: {type(error).__name__}: {error}. This is a fault of sparsmith; run again with --debug."
        )
        return SCREEN.failure("InternalError", message, _INTERNAL)
