"""The memory that a process may still take."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

import torch

_MIB = 2**20
_ADDRESSES = 640 * _MIB  # of libraries that a run still loads, and of the heaps of its threads
_M_MMAP_THRESHOLD = -3


def available_memory(device: str, processes_here: int = 1) -> tuple[int, int]:
    """Bytes that this process may still take on ``device``, and those that there are at all.

    On a CPU: the least of what the machine, the control groups (v1 and v2) and the limits of the
    process (``ulimit -v``, ``ulimit -d``) leave. Of the first two, each of ``processes_here`` has
    its part.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    machine = numbers("/proc/meminfo")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = machine["MemAvailable"] * 1024 if machine else total
    shared = [(free, total), *_control_groups()]
    limits = [(free // processes_here, total) for free, total in shared]
    used = numbers("/proc/self/status")
    for kind, name, loaded in (
        (resource.RLIMIT_AS, "VmSize", _ADDRESSES),
        (resource.RLIMIT_DATA, "VmData", 0),
    ):
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            limits.append((limit - used.get(name, 0) * 1024 - loaded, limit))
    free, total = min(limits)
    return max(free, 0), total


def numbers(path: str) -> dict[str, int]:
    """Of the lines ``name: number ...``, or ``name number``, of a file of Linux; elsewhere none."""
    if not os.path.exists(path):
        return {}
    lines = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _control_groups(root: str = "/sys/fs/cgroup", groups: str = "/proc/self/cgroup") -> list:
    """(free, limit) of the control groups of this process that limit its memory."""
    found = []
    for line in Path(groups).read_text().splitlines() if os.path.exists(groups) else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = Path(root), ("memory.max", "memory.current", "inactive_file")
        if controllers:
            base /= "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        # A container sees its own group at the root, whatever it is called outside.
        within = base / path.lstrip("/")
        for group in {within, *within.parents, base} - {*base.parents}:
            try:
                limit = int((group / names[0]).read_text())
                used = int((group / names[1]).read_text())
                cache = numbers(group / "memory.stat").get(names[2], 0)
            except (OSError, ValueError):  # no such group, or "max"
                continue
            if limit < 2**60:
                found.append((limit - used + cache, limit))
    return found


def spare_the_heap() -> None:
    """Have glibc give memory back as soon as it is freed. Else a training on a CPU takes up to 1.6
    times what it needs, as the heap keeps what does not fit what comes next; it takes 14 % less
    time, however (docs/memory.md)."""
    with contextlib.suppress(AttributeError, OSError):  # of another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MIB)
