"""An environment with DeepSpeed for the training benchmark, apart from penstock's own: made once, found by its folder.

    sudo apt install libaio-dev g++
    python -m benchmarks.deepspeed_environment

It has the torch and transformers of the environment that runs this. DeepSpeed compiles its parts when they are first
used; that is done here, with their objects kept in the folder, so that nothing is compiled under a memory cap.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from .reference_checkpoint import default_folder

VERSION = "0.19.8"
DONE = "done"
"""A file that is there once all steps were done."""
PARTS = ("AsyncIOBuilder", "CPUAdamBuilder", "ShareMemCommBuilder")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
NEEDS_LIBAIO = "#include <libaio.h>\nint main(void) { return io_destroy(0); }\n"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What runs a contender."""

    python: Path
    variables: dict[str, str] = field(default_factory=dict)
    """Of its process's environment, beside those that all have."""
    missing: str = ""
    """How to install it where it is not there."""


def own_environment(parent: Path) -> Environment:
    """The one that this runs in."""
    return Environment(python=Path(sys.executable))


def environment(parent: Path) -> Environment:
    """DeepSpeed's, below the folder of the benchmark."""
    folder = folder_of(parent)
    return Environment(
        python=folder / "bin" / "python",
        variables={
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(folder / "parts"),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",  # ninja is asked whether a part is up to date
        },
        missing="" if (folder / DONE).exists() else "python -m benchmarks.deepspeed_environment",
    )


def folder_of(parent: Path) -> Path:
    """Where the environment lies, made or not."""
    return parent / f"deepspeed-{VERSION}"


def require_libaio() -> None:
    """Raise FileNotFoundError where a program that needs libaio does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "needs_libaio.c")
        source.write_text(NEEDS_LIBAIO)
        command = [os.environ.get("CC", "cc"), str(source), "-laio", "-o", str(source.with_suffix(""))]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise FileNotFoundError(f"{' '.join(command[:1])} finds no libaio; apt install libaio-dev g++")


def make(parent: Path) -> None:
    """Make it, or what is left of it; CalledProcessError where a step fails, whose own message is above."""
    require_libaio()
    folder, made = folder_of(parent), environment(parent)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    pip = ["-m", "pip", "install", "--quiet", "--no-input", "-c", str(CONSTRAINTS)]
    parts = f"from deepspeed.ops import op_builder\nfor part in {PARTS}: getattr(op_builder, part)().load()"
    for step in (
        [*pip, "setuptools", "wheel", "ninja", "numpy"],
        [*pip, *same],
        [*pip, "--no-build-isolation", f"deepspeed=={VERSION}"],
        ["-c", parts],
    ):
        subprocess.run([str(made.python), *step], check=True, env={**os.environ, **made.variables})
    (folder / DONE).touch()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deepspeed_environment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dir", type=Path, default=None, help="where it is made (default: cache)")
    parent = parser.parse_args().dir or default_folder()
    try:
        if environment(parent).missing:
            make(parent)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    print(folder_of(parent))


if __name__ == "__main__":
    main()
