"""The processes of a loader, where a whole run is signalled."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable

from torch.utils.data import DataLoader


def keep_workers(loader: Iterable) -> None:
    """Let the workers of ``loader`` work on where a terminal or a scheduler signals all processes
    of a run: the step that is under way needs them. They end with the process that started them."""
    while loader is not None and not isinstance(loader, DataLoader):
        loader = getattr(loader, "dataset", None)  # what Detectron2 wraps one in
    if loader is not None:
        loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn)


def _init_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if init:
        init(worker_id)


def _end_with_parent() -> None:
    """End this process where the one that started it exits, which sends SIGTERM (of others it does
    nothing), and where it was killed: PyTorch's workers hang then if what they have loaded fills a
    pipe."""
    parent, started_by = multiprocessing.parent_process(), os.getppid()  # a forkserver, perhaps
    while os.getppid() == started_by and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received and received.si_pid == parent.pid:
            break
    os._exit(0)
