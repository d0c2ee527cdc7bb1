"""What operating systems do in their own ways: locks, memory. Windows has no fcntl and no resource."""

import importlib
import sys


def module(name):
    """A module of the standard library, or None on a system that has none of this name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl = module("fcntl")
msvcrt = module("msvcrt")
resource = module("resource")


def lock(file):
    """Locks an open file until it is closed or this process ends. BlockingIOError or PermissionError where
    another process holds the lock. A system without locks of this kind locks nothing."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def peak_memory_gib():
    """The largest resident memory that this process has had, NaN where the system does not tell."""
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return peak * unit / 2**30
