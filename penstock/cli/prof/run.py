"""`penstock prof run`: any script or module, recorded, with no change to it."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from ...memory.errors import UsageError

if TYPE_CHECKING:
    from ...runtime.profiler.profiler import Profiler


def run(
    command: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="The script and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write. Default: SCRIPT.prof")
    ] = None,
    level: Annotated[
        str, typer.Option(help="light (at most 1 % slower) or full (every module; at most 5 %).")
    ] = "light",
    force: Annotated[bool, typer.Option("-f", "--force", help="Overwrite the file if it is there.")] = False,
) -> int:
    """Run a Python script or module and record where its memory and time go.

    Works for any program that uses torch: modules, gradients, optimizer states and activations are found by themselves,
    and models that run under penstock also show their transfers and waits. The program's output, its exit code and its
    errors stay its own. Options of `prof run` come before SCRIPT.
    """
    target = command[0]
    if not module and not Path(target).is_file():
        raise UsageError(f"there is no script {target}: name a file, or -m and a module")
    path = output or Path(f"{Path(target).stem}.prof")
    from ...runtime.profiler.profiler import Profiler  # torch takes seconds

    if level not in ("light", "full"):
        raise UsageError(f"--level {level}: use light or full")
    profiler = Profiler(path, level=level, force=force)  # type: ignore[arg-type]
    pid = os.getpid()
    code = _run(profiler, target, command, module)
    if os.getpid() != pid:
        return code  # a child that the script forked and let return: the file is its parent's
    summary = profiler.summary()
    print(f"{summary.verdict}", file=sys.stderr)
    print(f"wrote {path}: {summary.recorded} records. Next: penstock prof report {path}", file=sys.stderr)
    return code


def _run(profiler: Profiler, target: str, command: list[str], module: bool) -> int:
    before = sys.argv, list(sys.path)
    with ExitStack() as recording:
        recording.enter_context(profiler)
        try:
            with recording.pop_all():  # inside, so that the recording knows how the program ended
                sys.argv = list(command)
                if module:
                    sys.path.insert(0, os.getcwd())
                    runpy.run_module(target, run_name="__main__", alter_sys=True)
                else:
                    sys.path.insert(0, str(Path(target).resolve().parent))
                    runpy.run_path(target, run_name="__main__")
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:  # the program's own: shown as Python would, from the program's first frame on
            traceback.print_exception(type(error), error, _program_frames(error.__traceback__, target))
            return 1
        finally:
            sys.argv, sys.path[:] = before[0], before[1]
    return 0


def _program_frames(frames: TracebackType | None, target: str) -> TracebackType | None:
    """A traceback without what leads up to the program's own first frame."""
    found = frames
    while found is not None and found.tb_frame.f_code.co_filename != target:
        found = found.tb_next
    return found or frames
