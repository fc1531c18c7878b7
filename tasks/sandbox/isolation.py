"""Linux namespaces and limits: what a process gives up for good, called by itself. Standard library only."""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

_NEW_NAMESPACES = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # files, processes, network, IPC, host
_NEW_USER = 0x10000000
_PRIVATE, _BIND, _RECURSIVE, _NOSUID, _NODEV, _DETACH = 1 << 18, 4096, 16384, 2, 4, 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_SETATTR = -100, 0x8000, 442
_READ_ONLY = 1 | 2 | 4  # no set-user-id programs and no devices either
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SIGKILL = 9
NOBODY = 65534
SCRATCH_BYTES = 16 * 2**20
"""of the temporary folder, and of a file"""
OPEN_FILES = 64

_NULL = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
_libc = ctypes.CDLL(None, use_errno=True)


class NotIsolatedError(OSError):
    """The machine does not give a process what would isolate it."""


def isolate(root: Path) -> None:
    """Take away network, files, other processes and user from this process and those that it starts.

    Nothing is left of the files but, read-only, Python's library and what it loads, and an empty `/tmp` in memory. The
    next process that this one starts is the first of the new process namespace.

    Args:
        root: an empty folder that becomes the root of the files.

    Raises:
        NotIsolatedError: the machine does not allow it. The process is then good for nothing.
    """
    _check_linux()
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise NotIsolatedError(f"no way to change the root on {platform.machine()}")
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_NAMESPACES | (0 if user == 0 else _NEW_USER)), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, _PRIVATE | _RECURSIVE)
    _mount("tmpfs", str(root), "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for folder in _library_folders():
        target = root / folder.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        _mount(str(folder.resolve()), str(target), None, _BIND | _RECURSIVE)
    (root / "tmp").mkdir(exist_ok=True)
    os.chdir(root)
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    _check(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, 32), "mount_setattr")
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, f"size={SCRATCH_BYTES},nr_inodes=1000,mode=1777")
    os.chdir("/tmp")
    become_nobody()


def become_nobody() -> None:
    """Give up the rights of root, if the process has them, and all capabilities.

    Raises NotIsolatedError if Python's own library cannot be read any more.
    """
    _check_linux()
    if os.getuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise NotIsolatedError(f"user {NOBODY}: {error.strerror}") from None
    _check(_libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if not os.access(os.__file__, os.R_OK):
        raise NotIsolatedError(f"user {os.getuid()} may not read {os.__file__}")


def end_with_parent() -> None:
    """Let the process be killed when its parent ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "pdeathsig")


def hide_memory() -> None:
    """Let no process of the same user read or write this one's memory."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def null_device() -> int:
    """Return an open file that reads nothing and forgets everything; it lasts where there are no devices."""
    return _NULL


def limit(seconds: int, mebibytes: int) -> None:
    """Bound this process: seconds of CPU time, MiB of memory, files; it starts no process and no thread."""
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, mebibytes * 2**20, mebibytes * 2**20),
        (resource.RLIMIT_FSIZE, SCRATCH_BYTES, SCRATCH_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        within = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (min(soft, within), within))


def _library_folders() -> list[Path]:
    """Folders that Python and what it loads are in; none within another."""
    system = [Path(name) for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")]
    own = [Path(os.__file__).parents[1], *(Path(name) for name in sys.path if name)]
    found: list[Path] = []
    for folder in sorted({one for one in [*system, *own] if one.is_dir()}, key=lambda one: len(one.parts)):
        if not any(folder.is_relative_to(one) for one in found):
            found.append(folder)
    return found


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _check_linux() -> None:
    if sys.platform != "linux":
        raise NotIsolatedError(f"the sandbox is for Linux, this is {sys.platform}")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise NotIsolatedError(f"{what}: {os.strerror(ctypes.get_errno())}")
