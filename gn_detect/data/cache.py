"""Files that spare other processes, and later runs, to read the user's data again.

They lie in the cache of Detectron2's downloads. Without them all works the same, later.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable

from iopath.common.file_io import get_cache_dir

logger = logging.getLogger(__name__)


def cache_file(kind: str, path: str) -> str:
    """Where what is known of ``path``, the user's file or directory, is kept."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return os.path.join(get_cache_dir(), "gn_detect", kind, name)


def write_cache(cached: str, write: Callable[[str], object]) -> None:
    """Replace a file at once, so that other processes find it whole.

    Args:
        cached: of :func:`cache_file`.
        write: writes the file whose path it is given.
    """
    try:
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(cached))
        os.close(descriptor)
        write(temporary)
        os.replace(temporary, cached)
    except (OSError, ValueError) as error:  # ValueError: a name that is not in UTF-8
        logger.warning(f"{cached} cannot be written ({error}): the data is read again next time")
