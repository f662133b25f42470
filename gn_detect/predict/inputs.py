"""What to predict on, by names on a command line: files, folders, patterns, videos."""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import supervision as sv

from gn_detect.data import DataError
from gn_detect.data.formats.to_coco import IMAGE_SUFFIXES

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}

logger = logging.getLogger(__name__)
# Which logs what it then raises.
logging.getLogger("supervision._cv2._video").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Input:
    """An image or a video.

    Attributes:
        path: of the file.
        name: the path from the folder that all inputs have in common.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(given: Iterable[str], output: str | os.PathLike) -> tuple[Path, list[Input]]:
    """
    Args:
        given: files; folders, of which all images and videos at any depth, and behind links, are
            taken, but hidden ones; patterns (``**`` for folders at any depth).
        output: a folder that is left out, as results of an earlier call may be there.

    Returns:
        the folder that the names are relative to, and the inputs: those of a folder by name, each
        file once.

    Raises:
        DataError: a name stands for nothing.
    """
    output, found, folders = Path(output).resolve(), {}, []
    for name in given:
        paths = [Path(name)] if os.path.exists(name) else map(Path, glob.glob(name, recursive=True))
        number = len(folders)
        for path in sorted(Path(os.path.abspath(path)) for path in paths):  # without ".."
            files = _files_in(path, output) if path.is_dir() else [path]
            folders += [path if path.is_dir() else path.parent] if files else []
            for file in files:
                found.setdefault(os.path.realpath(file), file)
        if number == len(folders):
            raise DataError(
                f"{name}: there is no such file, and no image or video in a folder of this name or "
                f"of this pattern ({', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}); a file "
                "named by itself may be of any kind that Pillow reads"
            )
    root = Path(os.path.commonpath(folders))
    return root, [Input(path, path.relative_to(root).as_posix()) for path in found.values()]


def _files_in(folder: Path, output: Path) -> list[Path]:
    files, seen = [], {str(output), os.path.realpath(folder)}  # links may lead back
    for parent, folders, names in os.walk(folder, followlinks=True):
        places = {n: os.path.realpath(os.path.join(parent, n)) for n in sorted(folders)}
        folders[:] = [n for n, place in places.items() if n[0] != "." and place not in seen]
        seen.update(places[n] for n in folders)
        files += [Path(parent, name) for name in sorted(names) if name[0] != "."]
    taken = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if others := Counter(file.suffix.lower() or "no suffix" for file in set(files) - set(taken)):
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        logger.warning(f"{folder}: files of other kinds are left out ({kinds}); name them")
    return taken


def open_video(path: Path) -> tuple[sv.VideoInfo, Iterator[np.ndarray]]:
    """What a video file tells of itself, where ``total_frames`` may be an estimate; and its frames
    in order, each (height, width, 3) uint8 RGB, as far as they can be decoded.

    Raises:
        DataError: there is no frame.
    """
    try:
        info = sv.VideoInfo.from_video_path(str(path))
        frames = sv.get_video_frames_generator(str(path))
        first = next(frames, None)
    except Exception as error:  # supervision's, and FFmpeg's
        raise DataError(f"{path} is no video that can be decoded ({error})") from None
    if first is None:
        raise DataError(f"{path} is a video without frames that can be decoded")
    frames = itertools.chain([first], frames)
    return info, (np.ascontiguousarray(frame[..., ::-1]) for frame in frames)  # of BGR
