"""Compiles DeepSpeed's shared-memory op for CPU, so that no worker does it while its peers wait.

Command: .venv/bin/python infra/prebuild_ops.py      (`make setup` and the Dockerfile run it; 1.5 minutes, later seconds)

The compiled op goes where training looks for it: TORCH_EXTENSIONS_DIR, else `torch_extensions` in the Python environment. A
compile that was killed leaves a `lock` file there, for which torch would wait for ever: one that no living process holds
open is removed. Needs a C++ compiler.
"""

import os
import sys
from pathlib import Path


def is_held(path: Path) -> bool:
    """Whether a process on this machine has the file open, as torch's FileBaton has while it compiles."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.samefile(path):
                return True
        except OSError:  # the process or the file went away, or belongs to somebody else
            continue
    return False


def remove_stale_lock(build_directory: Path) -> None:
    """Removes the lock that a killed compile left behind."""
    lock = build_directory / "lock"
    if lock.exists() and not is_held(lock):
        print(f"{lock}: left by a compile that was killed, removed", file=sys.stderr)
        lock.unlink(missing_ok=True)


def main() -> None:
    """Builds the op, or loads the one that is built."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    from pipeline.training.engine.deepspeed_engine import prepare_environment

    prepare_environment()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = ShareMemCommBuilder()
    remove_stale_lock(Path(_get_build_directory(builder.name, verbose=False)))
    builder.load(verbose=False)
    print(f"{builder.name}: compiled and loaded")


if __name__ == "__main__":
    main()
