"""Functions that are made as a program runs: LLVM compiles them for this processor, torch's threads run them.

LLVM comes with llvmlite, which is optional. Threads are those of the OpenMP library that torch computes with: between
two of its products they are awake already, and others would compete with them for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

logger = logging.getLogger(__name__)

_compiling: Final = threading.Lock()
"""One module at a time: its types are the library's, and known to all threads."""
# A forked child has no thread that would give it back.
os.register_at_fork(before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release)
_engines: Final[list[Any]] = []
"""Own what was compiled, which is there as long as the process: others have its addresses."""


@functools.cache
def available() -> bool:
    """Whether functions can be made here: LLVM is there and knows the processor, and torch's threads can be had."""
    try:
        _parallel()
        _machine()
    except Exception as error:  # one that fits neither this processor nor what is called here is as good as none
        logger.info("nothing is compiled for this processor: %s: %s", type(error).__name__, error)
        return False
    return True


@functools.cache
def converts_fp16() -> bool:
    """Whether the processor makes fp32 of fp16 by an instruction. Where it does not, LLVM calls a function for each."""
    from llvmlite import binding

    return platform.machine() == "aarch64" or bool(binding.get_host_cpu_features().get("f16c"))


def compiled(build: Callable[[], Any], name: str) -> int:
    """The address of a function of a module, `void name(int64 *job)`, compiled for this processor.

    Args:
        build: Makes the module, an `llvmlite.ir.Module`.
        name: Of the function.

    Raises:
        RuntimeError: LLVM refuses the module.
    """
    from llvmlite import binding

    with _compiling:
        machine = _machine()
        module = build()
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        parsed = binding.parse_assembly(str(module))
        parsed.verify()
        engine = binding.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        _engines.append(engine)
        return int(engine.get_function_address(name))


def run(address: int, job: ctypes.Array[ctypes.c_int64], *, threads: int) -> None:
    """Call a compiled function with a job, in so many threads at once. Python's other threads go on meanwhile."""
    _parallel()(address, ctypes.addressof(job), threads, 0)


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None]:
    """What begins a parallel region, as GCC calls it: function, its argument, threads, flags.

    Raises:
        OSError: this torch has no such library of threads.
        AttributeError: likewise.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    function = ctypes.CDLL(str(library)).GOMP_parallel  # which is looked for in what that one is linked with
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return function


def _machine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)
