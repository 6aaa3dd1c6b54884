"""`main`: builds the command line from the registry, and turns every way to end into an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final

import typer

from ..memory.errors import PenstockError
from .verbs import GROUPS, VERBS

OK: Final = 0
RUNTIME_FAILURE: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

# typer brings its own copy of click in new versions and uses click itself in old ones: this finds UsageError in both.
_PARSER_ERRORS: Final = typer.BadParameter.__bases__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the arguments of the process) and return its exit code.

    0 ok, 1 runtime failure, 2 usage, 3 does not fit, 4 threshold failed, 130 interrupted. Data go to stdout, everything
    else to stderr.
    """
    try:
        code = typer.main.get_command(_build())(args=argv, prog_name="penstock", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer catches Ctrl-C and makes it this code
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else OK
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except typer.Abort:
        return _report("aborted", RUNTIME_FAILURE)
    except BrokenPipeError:
        # Whoever read our output (`| head`) is gone. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUNTIME_FAILURE
    except PenstockError as error:
        return _report(str(error), error.exit_code)
    except Exception as error:  # the last frame: whatever it is, the user gets one line and an exit code
        return _report_parser(error) if isinstance(error, _PARSER_ERRORS) else _report_unexpected(error)


def _build() -> typer.Typer:
    app = typer.Typer(
        name="penstock",
        help="Run and train models that are larger than the machine.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # joins the lines of a paragraph
    )
    app.callback()(_global_options)
    for name, verb in VERBS.items():
        app.command(name)(verb)
    for name, group in GROUPS.items():
        app.add_typer(group(), name=name)
    return app


def _global_options(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda on: _version(on)),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"penstock {version('penstock')}")
        except PackageNotFoundError:
            typer.echo("penstock (not installed)")
        raise typer.Exit


def _report(message: str, code: int) -> int:
    if _debugging():
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def _report_parser(error: Exception) -> int:
    error.show()  # type: ignore[attr-defined]  # the usage line, a hint at --help, what is wrong
    return int(getattr(error, "exit_code", USAGE))


def _report_unexpected(error: Exception) -> int:
    first_line = next(iter(str(error).splitlines()), "")
    hint = "" if _debugging() else " (set PENSTOCK_DEBUG=1 for the traceback)"
    return _report(f"{type(error).__name__}: {first_line}{hint}", RUNTIME_FAILURE)


def _debugging() -> bool:
    return os.environ.get("PENSTOCK_DEBUG", "0") not in ("", "0")
