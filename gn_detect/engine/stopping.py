"""A run that is asked to stop, by a terminal, a scheduler or another of its processes, and that
loses nothing by it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Seconds that a process has to stop by itself once another one has.
GRACE = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stopped(SystemExit):
    """The run was asked to stop. No ``Exception``, so that nobody takes it for an error.

    Attributes:
        signum: the signal that asked.
        message: a line that says where it stopped, what is saved, and how to go on.
        code: of the process: 130 after Ctrl-C, otherwise 143, as of one that SIGTERM has ended.
    """

    def __init__(self, signum: int, where: str):
        super().__init__(130 if signum == signal.SIGINT else 143)
        self.signum = signum
        self.message = f"{signal.Signals(signum).name}: stopped {where}"


class Request:
    """To stop this process.

    Attributes:
        signum: the signal that came first; 0: none has come.
        waits: for :meth:`agree`; otherwise a signal stops the process at once, wherever it is.
        raised: that it has stopped the process.
        doing, so_far: for the message: what is interrupted ("" or "in the ... "), and what is done
            and saved.
    """

    def __init__(self):
        self.raised = False  # and so it stays to the end of the process
        self.reset("")

    def reset(self, so_far: str) -> None:
        self.signum = 0
        self.waits = False
        self.doing = ""
        self.so_far = so_far
        self._process = os.getpid()
        self._first_interrupt: float | None = None

    def receive(self, signum: int, frame: object = None) -> None:
        """The handler of ``SIGNALS``."""
        if os.getpid() != self._process:  # a fork, such as a loading worker
            return
        if signum == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            # The terminal, torchrun and the parent process may all deliver one Ctrl-C.
            if now - self._first_interrupt > 1:
                os._exit(130)
        if not self.signum:
            self.signum = signum
            if not self.waits:
                self.stop()

    def stop(self) -> None:
        """Raise :class:`Stopped` where a signal has come."""
        if self.signum:
            self.raised = True
            raise Stopped(self.signum, self.doing + self.so_far)

    def agree(self, also: bool = False) -> tuple[bool, bool]:
        """Whether any of the processes, all of which call it, was asked to stop; and whether
        ``also`` holds in any of them."""
        found = torch.tensor([self.signum, also])
        if comm.get_world_size() > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        signum, also = found.tolist()
        if signum:  # one that comes just now is for the next time
            self.signum = signum
        return bool(signum), bool(also)

    def stop_together(self) -> None:
        """Raise :class:`Stopped` where any of the processes, all of which call it, was asked to."""
        if self.agree()[0]:
            self.stop()

    @contextlib.contextmanager
    def immediately(self, doing: str) -> Iterator[None]:
        """Within it, a signal does not wait. All processes enter and leave it together.

        Raises:
            Stopped: a signal comes, or had come before.
        """
        before, self.doing = (self.waits, self.doing), doing
        try:
            self.stop_together()
            self.waits = False
            self.stop()  # where one came just now
            yield
            self.waits = True
            self.stop_together()
        except Exception:
            self.stop()  # the error is of a connection to a process that stopped before this one
            raise
        finally:
            self.waits, self.doing = before


request = Request()


@contextlib.contextmanager
def handle_signals(
    so_far: str = "before the first step: nothing was trained yet",
) -> Iterator[None]:
    """Within it, ``SIGNALS`` stop this process: at once, or after the step where it trains. A
    second Ctrl-C ends it in either case. For the main thread.

    Args:
        so_far: what to say of a stop before a training has begun.

    Raises:
        Stopped: a signal has come.
    """
    request.reset(so_far)
    request.raised = False
    try:
        with handled_by(request.receive):
            yield
    finally:
        request.reset("")


@contextlib.contextmanager
def handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within it, ``handler`` is that of ``SIGNALS``; SIGHUP stays ignored where it is (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [signum for signum in SIGNALS if not (ignored and signum == signal.SIGHUP)]
    previous = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, signal.SIG_DFL if before is None else before)


def stop_as_others(signum: int) -> None:
    """Stop this process because another one has stopped, for the signal ``signum``.

    For a daemon thread. The main thread may wait for the other process in a collective operation,
    where Python runs no handler: after ``GRACE`` seconds the process ends without it.
    """
    if not request.signum:
        signal.pthread_kill(threading.main_thread().ident, signum)
    time.sleep(GRACE)
    stop = Stopped(request.signum or signum, request.doing + request.so_far)
    if comm.is_main_process() and not request.raised:
        logger.warning(stop.message)
    os._exit(stop.code)
