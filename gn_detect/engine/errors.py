"""What ends a run, as a sentence to its user."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from gn_detect.checkpoint import CheckpointError, WeightsError, describe_last
from gn_detect.config import ConfigError
from gn_detect.data.coco import DataError

from .stopping import Stopped

logger = logging.getLogger(__name__)
_run_directory = ""


def set_run_directory(directory: str) -> None:
    """State where this process's run has its checkpoints, for :func:`last_checkpoint`."""
    global _run_directory
    _run_directory = directory


def run_directory() -> str:
    """Empty where no run has begun."""
    return _run_directory


def last_checkpoint() -> str:
    """The end of a message: what is safe, and how to go on."""
    if not _run_directory:
        return ""
    last = describe_last(_run_directory)
    return f"{last}; go on with --resume" if last.endswith("intact") else f"{last}: start again"


class ProcessesError(RuntimeError):
    """Processes that do not meet, differ, or lose each other. The message names them, and says what
    to do."""


# What is the user's to mend: shown as a sentence, without a traceback.
EXPECTED_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    FloatingPointError,
    ProcessesError,
    WeightsError,
)
# Of gloo and of NCCL, whose other end is gone.
_LOST_CONNECTION = re.compile(r"Connection (closed|reset|refused)|Broken pipe|NCCL", re.I)
# Of PyTorch's allocators, of oneDNN, and of C++.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|bad_alloc|[Cc]annot allocate memory|"
    r"could not create a (memory|primitive)"
)
REMEDY = (
    "set SOLVER.IMS_PER_GPU to fewer images or auto, MODEL.GN.MEMORY to lean or checkpoint, or the "
    "sizes of INPUT smaller (lazy configs: train.ims_per_gpu, model.memory, the augmentations)"
)
# Of PyTorch's DataLoader.
_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.+?)\.?\s*$", re.M)


def sentence(error: BaseException) -> str | None:
    """The message for a user of one of ``EXPECTED_ERRORS``, of a loading worker that died, or of a
    process that was killed; None for any other error.

    One that comes from a data loading worker or from another process carries its traceback as
    text, and the sentence is the last line of it.
    """
    # A disk that is full for a checkpoint is full for the metrics that Detectron2 writes after it.
    if isinstance(error, OSError) and isinstance(error.__context__, CheckpointError):
        error = error.__context__
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    for kind in EXPECTED_ERRORS:
        module, found, message = last.partition(f"{kind.__name__}: ")
        if found and " " not in module:
            return message
    if isinstance(error, EXPECTED_ERRORS):
        return " ".join(line.strip() for line in text.splitlines())
    if isinstance(error, ProcessExitedException) and error.signal_name:
        return (
            f"process {error.error_pid} (rank {error.error_index} of this machine) was ended by "
            f"{error.signal_name}{'; memory may have run out' * (error.signal_name == 'SIGKILL')}"
        )
    if isinstance(error, RuntimeError) and (lost := _LOST_WORKER.search(text)):
        return (
            f"data loading worker {lost[1]} {lost[2]}; where memory has run out, lower "
            "DATALOADER.NUM_WORKERS (in lazy configs dataloader.train.num_workers); "
            f"{last_checkpoint()}"
        )
    if is_out_of_memory(error):
        return f"out of memory ({text.partition(chr(10))[0] or 'MemoryError'}): {REMEDY}; " + (
            last_checkpoint() or "nothing was trained yet"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the machine."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or (
        isinstance(error, (OSError, RuntimeError)) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation found another process gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Within it, an error that has a :func:`sentence` ends the process with it, and the first
    process says why it has :class:`.Stopped`."""
    try:
        yield
    except Stopped as stop:
        if comm.is_main_process():
            logger.warning(stop.message)
        raise
    except Exception as error:
        if (message := sentence(error)) is None:
            raise
        sys.exit(f"error: {message}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, nothing but errors is logged: the rest is said elsewhere."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def shorten_expected_error(record: logging.LogRecord) -> bool:
    """Log what has a :func:`sentence` as that; Detectron2 logs a traceback of it."""
    error = record.exc_info and record.exc_info[1]
    if not error or isinstance(error, ConfigError):
        return True
    message = sentence(error)
    if message is None and is_lost_connection(error):
        message = "the connection to another process was lost"
    if message:
        record.msg, record.exc_info = f"{record.msg} {message}", None
    return True
