"""`penstock prof run`: any script or module, recorded, with no change to it."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...memory.errors import PenstockError, UsageError

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
    try:
        summary = profiler.summary()
    except PenstockError as error:  # a full disk, a script that cleans up too well: the exit code stays the program's
        print(f"error: {error}", file=sys.stderr)
        return code
    print(f"{summary.verdict}", file=sys.stderr)
    print(f"wrote {path}: {summary.recorded} records. Next: penstock prof report {path}", file=sys.stderr)
    return code


def _run(profiler: Profiler, target: str, command: list[str], module: bool) -> int:
    before = sys.argv, list(sys.path), sys.modules.get("__mp_main__")
    with ExitStack() as recording:
        recording.enter_context(profiler)
        try:
            with recording.pop_all():  # inside, so that the recording knows how the program ended
                sys.argv = list(command)
                sys.modules["__mp_main__"] = _Main("__mp_main__")
                if not sys.flags.safe_path:  # in place of our own entry: imports find what they would without us
                    sys.path[:1] = [os.getcwd() if module else str(Path(target).resolve().parent)]
                if module:
                    runpy.run_module(target, run_name="__main__", alter_sys=True)
                else:
                    _run_file(target)
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:  # the program's own: shown as Python would, from the program's first frame on
            shown = error.with_traceback(_program_frames(error.__traceback__))
            sys.excepthook(type(error), shown, shown.__traceback__)
            return 1
        finally:
            sys.argv, sys.path[:] = before[0], before[1]
            if before[2] is not None:
                sys.modules["__mp_main__"] = before[2]
    return 0


def _run_file(target: str) -> None:
    # Not runpy.run_path: it writes the path that it is given into sys.argv too. `__file__` is absolute, as Python makes
    # it, because the script may go to another folder and processes that it spawns import it; argv is as it was typed.
    path, before = os.path.abspath(target), sys.modules["__main__"]
    main = ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins, __cached__=None)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    finally:
        sys.modules["__main__"] = before


class _Main(ModuleType):
    """What processes that a script spawns call its main module: multiprocessing has tied that name to ours."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["__main__"], name)


def _program_frames(frames: TracebackType | None) -> TracebackType | None:
    """A traceback without what leads up to the program's own first frame; None where it has none (a syntax error)."""
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    return frames
