"""Numba's compiler, with its results kept on disk where every process that starts later finds them.

Numba alone would keep them beside the source or below the home folder, and refuse to compile where neither can be
written. Nor is that safe for processes that start at once: it numbers files by an index that two may read before either
writes. One may then load what was compiled of earlier source, or for the CPU of another machine that shares the folder.
Here the folder's name stands for source, versions and CPU, and every loop is called with arguments of one type: whoever
writes first or last, it is the same code.
"""

import os
import platform
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding
import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Have a function compiled at its first call, or read from disk if any process has compiled it before."""
    before, folder = numba.config.CACHE_DIR, _folder()
    numba.config.CACHE_DIR = "" if folder is None else str(folder)
    try:
        found: Loop = numba.njit(cache=folder is not None, nogil=True)(loop)
        return found
    finally:
        numba.config.CACHE_DIR = before


@cache
def _folder() -> Path | None:
    """Return the folder for what is compiled of the present source on this CPU; None if no folder can be written."""
    cpu = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    digest = sha256(repr((*cpu, numba.__version__, llvmlite.__version__, platform.python_version())).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    name = digest.hexdigest()[:16]
    folders = [Path(tempfile.gettempdir()) / f"sensmerge-{os.getuid()}-{name}"]
    if "HOME" in os.environ:
        folders.insert(0, Path(os.environ["HOME"]) / ".cache" / "sensmerge" / "kernels" / name)
    if numba.config.CACHE_DIR:
        folders.insert(0, Path(numba.config.CACHE_DIR) / f"sensmerge-{os.getuid()}-{name}")
    return next(filter(_is_ours, folders), None)


def _is_ours(folder: Path) -> bool:
    """Make a folder; return whether it can be written, and by no other user: what is read there is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
