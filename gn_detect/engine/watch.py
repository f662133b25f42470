"""Processes that end together: each learns at once that another one has failed, was killed, or was
asked to stop, also while it waits for it in a collective operation.

Each process holds a connection to the first one, which the kernel closes when the process dies, and
finds broken when its machine is gone. The collective operations of torch.distributed alone notice
the death of a process after their timeout, or (NCCL) never.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from gn_detect.checkpoint.saving import finish_writing

from .errors import ProcessesError, is_lost_connection, last_checkpoint, sentence
from .stopping import Stopped, stop_as_others

logger = logging.getLogger(__name__)

# Seconds that a process has to end by itself once another one has failed.
GRACE = 3.0


class Watch:
    """Of a process of a group, over the others.

    Args:
        store: of the group, to exchange the address.
        rank: of this process.
        names, machines: what each process is called in messages, and the index of its machine.
        host: where the first process can be reached.
    """

    def __init__(
        self, store: dist.Store, rank: int, names: list[str], machines: list[int], host: str
    ):
        self.rank = rank
        self.names = names
        self._here = [r for r in range(len(names)) if machines[r] == machines[rank]]
        self._failed = threading.Event()  # another process has
        self._heard = self._told = ""
        self._over = False
        connections = _accept(store, len(names)) if rank == 0 else _connect(store, rank, host)
        self._peers = {connection: peer for peer, connection in connections.items()}
        self._selector = selectors.DefaultSelector()
        for connection in self._peers:
            _keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """Run this process's part of the work within it.

        Raises:
            SystemExit: another process has failed, which is logged.
        """
        try:
            yield
        except Stopped as stop:
            self._tell("stopped", str(stop.signum))
            raise
        except BaseException as error:
            message = sentence(error)
            # What the connections of torch.distributed raise is another process's fault.
            if message is None and self._failed.wait(GRACE):
                self._thread.join()  # it ends this process
            self._told = message or f"{type(error).__name__}: {error}"
            self._tell("failed", self._told)
            # Where all have found the same, the first one of each machine says it.
            if self.rank != self._here[0] and self._failed.wait(1) and self._heard == self._told:
                sys.exit(1)
            if is_lost_connection(error):
                raise ProcessesError(
                    f"the connection to another process was lost ({error}); {last_checkpoint()}"
                ) from error
            raise
        else:
            self._tell("done")
        finally:
            self._over = True

    def _tell(self, what: str, text: str = "", rank: int | None = None) -> None:
        """Tell the first process, or, as the first, all others, what has become of ``rank``."""
        rank = self.rank if rank is None else rank
        content = json.dumps([what, rank, text]).encode() + b"\n"
        for connection, peer in self._peers.items():
            if peer != rank:
                with contextlib.suppress(OSError):  # it has ended, which _listen sees
                    connection.sendall(content)

    def _listen(self) -> None:
        received = dict.fromkeys(self._peers, b"")
        while received:
            for key, _ in self._selector.select():
                connection, peer = key.fileobj, self._peers[key.fileobj]
                try:
                    content = connection.recv(4096)
                except OSError:  # the machine is gone
                    content = b""
                *lines, received[connection] = (received[connection] + content).split(b"\n")
                news = [json.loads(line) for line in lines]
                if not content:
                    lost = f"was killed, or its machine is gone; {last_checkpoint()}"
                    news.append(["killed", peer, lost])
                for what, rank, text in news:
                    self._hear(what, rank, text)
                if any(what in ("done", "stopped") and rank == peer for what, rank, _ in news):
                    del received[connection]
                    self._selector.unregister(connection)

    def _hear(self, what: str, rank: int, text: str) -> None:
        if self.rank == 0 and what != "done":
            self._tell(what, text, rank)
        if what == "stopped" and not self._over:
            stop_as_others(int(text))
        elif what in ("failed", "killed"):
            self._heard = text
            self._failed.set()
            # The main thread may wait for the other process for ever. Or it ends by itself, as the
            # process that failed does, whose error is then the first that a launcher sees.
            time.sleep(GRACE)
            if self._over and not self._told:  # this process is done, and so were the others
                return
            if self._told != text:
                message = f"{self.names[rank]} {text}"
                logger.error(message)  # on the terminal, too, in the first process
                if self.rank and self.rank == min(r for r in self._here if r != rank):
                    if what == "killed" or rank not in self._here:  # it cannot say it here
                        print(f"error: {message}", file=sys.stderr, flush=True)
            finish_writing()  # what is saved now, the others were there for
            os._exit(1)


def _accept(store: dist.Store, world_size: int) -> dict[int, socket.socket]:
    token = secrets.token_hex(16)
    connections: dict[int, socket.socket] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
        store.set("watch", json.dumps([server.getsockname()[1], token]))
        server.settimeout(store.timeout.total_seconds())
        while len(connections) < world_size - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise ProcessesError(
                    f"only {len(connections) + 1} of {world_size} processes could connect to port "
                    f"{server.getsockname()[1]} of {socket.gethostname()}: open all ports between "
                    "the machines"
                ) from None
            connection.settimeout(30)
            # Unbuffered: what follows the line may be there already, and is for _listen.
            with connection.makefile("rb", buffering=0) as lines:
                theirs, _, rank = lines.readline(64).strip().decode("latin-1").partition(" ")
            if secrets.compare_digest(theirs, token):
                connections[int(rank)] = connection
            else:
                connection.close()
    return connections


def _connect(store: dist.Store, rank: int, host: str) -> dict[int, socket.socket]:
    port, token = json.loads(store.get("watch"))
    try:
        connection = socket.create_connection((host, port), timeout=store.timeout.total_seconds())
    except OSError as error:
        raise ProcessesError(
            f"rank {rank} on {socket.gethostname()} cannot reach port {port} of {host} "
            f"({error.strerror or error}), though it can reach the port where the processes met: "
            "open all ports between the machines"
        ) from None
    connection.sendall(f"{token} {rank}\n".encode())
    return {0: connection}


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel ask every 5 seconds whether the other machine is there; 15 without an answer
    break the connection."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
