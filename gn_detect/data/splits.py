"""Training and validation data: one COCO file split in two, and pictures that are in both."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from pathlib import Path

import msgspec
import numpy as np
from detectron2.utils import comm

from gn_detect.distributed import from_first_process, on_each_machine

from . import DataError
from .coco import load_coco
from .coco_data import CocoData
from .coco_file import decode_json, paused_gc
from .same_files import check_same_files

logger = logging.getLogger(__name__)

PARTS = ("train", "val")
_COMPARED = 200  # pairs of pictures whose content is read


def split_coco(
    json_file: str, directory: str, fraction: float, *, seed: int = 0, keep: bool = False
) -> list[str]:
    """Split a COCO JSON by images into ``train.json`` and ``val.json``, and log what is in them.

    All records stay as they are, with the ids that they have. All processes of a run call it: the
    first one chooses the images, and each machine writes its own two files.

    Args:
        directory: of the two files; it is made. Machines need not share it.
        fraction, seed: of :func:`validation_images`.
        keep: leave the files that an earlier run has written there.

    Returns:
        their paths, of the training set first.

    Raises:
        DataError: the file cannot be read, is not the same on all machines, or has a single
            picture; or the parts cannot be written.
    """
    paths = [os.path.join(directory, f"{part}.json") for part in PARTS]
    check_same_files({"--train-json": json_file})

    def kept() -> set | None:
        found = keep and all(map(os.path.isfile, paths))
        return set(load_coco(paths[1]).image_ids) if found else None

    def choose() -> tuple[set, str]:
        if (before := kept()) is not None:
            return before, "is split as it was before"
        data = load_coco(json_file)
        chosen = validation_images(data, fraction, seed)
        ids = {id_ for id_, c in zip(data.image_ids, chosen, strict=True) if c}
        return ids, f"is split by images (--val-fraction {fraction:g}, seed {seed})"

    def write() -> None:
        if kept() != validation:
            try:
                _write(json_file, paths, validation)
            except OSError as error:
                raise DataError(f"cannot write {directory}: {error.strerror}") from None

    validation, how = from_first_process(choose)
    on_each_machine(write)
    if comm.is_main_process():
        _log_parts(json_file, paths, how)
    return paths


def _log_parts(json_file: str, paths: list[str], how: str) -> None:
    parts = [load_coco(path) for path in paths]
    counts = [np.bincount(p.category[~p.crowd], minlength=len(p.categories)) for p in parts]
    sizes = [
        f"{path} with {len(p.image_ids)} images, {count.sum()} objects"
        for path, p, count in zip(paths, parts, counts, strict=True)
    ]
    classes = [
        f"{name} {a} + {b}" for name, a, b in zip(parts[0].classes.values(), *counts, strict=True)
    ]
    logger.info(f"{json_file} {how} into {' and '.join(sizes)} ({', '.join(classes)})")
    for part, count, other in zip(PARTS, counts, counts[::-1], strict=True):
        names = [
            n
            for n, a, b in zip(parts[0].classes.values(), count, other, strict=True)
            if b and not a
        ]
        if names:
            logger.warning(f"the {part} part has no object of the classes {', '.join(names)}")


def validation_images(data: CocoData, fraction: float, seed: int = 0) -> np.ndarray:
    """Choose the images of a validation set, so that it has this fraction of the images of each
    class, and each class of two images or more is in both parts if possible: iterative
    stratification (Sechidis et al. 2011, https://doi.org/10.1007/978-3-642-23808-6_10).

    Images without objects are one class more. Images of one file stay together. The order of the
    file does not matter.

    Args:
        fraction: of the images, between 0 and 1.
        seed: another one gives another choice.

    Returns:
        which images are for validation, (I,) bool.

    Raises:
        DataError: there is one picture alone.
    """
    names = [os.path.normpath(name) for name in data.file_names]
    pictures = sorted(set(names), key=lambda n: hashlib.sha256(f"{seed}/{n}".encode()).digest())
    if len(pictures) < 2:
        raise DataError(f"{data.json_file} has one picture, {names[0]}; two are needed to split it")
    positions = {name: position for position, name in enumerate(pictures)}
    picture = np.array([positions[name] for name in names])
    objects = ~data.crowd
    has = np.zeros((len(pictures), len(data.categories) + 1), bool)
    has[picture[data.image[objects]], data.category[objects]] = True
    has[:, -1] = ~has.any(axis=1)
    total = has.sum(axis=0)
    wanted = np.where(total > 1, np.clip(fraction * total, 1, np.maximum(total - 1, 1)), 0)
    lacking = np.stack([total - wanted, wanted])  # of each class, in the two parts
    room = np.array([1 - fraction, fraction]) * len(pictures)
    left, part = total.astype(float), np.full(len(pictures), -1)
    while (part < 0).any():
        rarest = np.where(left > 0, left, np.inf).argmin()
        for i in np.flatnonzero(has[:, rarest] & (part < 0)):
            to = max((0, 1), key=lambda p: (lacking[p, rarest], room[p]))
            part[i] = to
            lacking[to] -= has[i]
            room[to] -= 1
            left -= has[i]
    _mend(part, has, total)
    return part[picture] == 1


def _mend(part: np.ndarray, has: np.ndarray, total: np.ndarray) -> None:
    """Move pictures to a part that lacks a class of theirs, or everything, where the other part
    keeps its classes."""
    for to in (0, 1):
        for label in np.flatnonzero(total > 1):
            if has[part == to, label].any():
                continue
            spare = has[part != to].sum(axis=0) > 1
            movable = np.flatnonzero(has[:, label] & ~(has & ~spare).any(axis=1))
            part[movable[:1]] = to
        if not (part == to).any():
            part[-1] = to


def _write(json_file: str, paths: list[str], validation: set) -> None:
    """Write the records of the images ``validation`` (ids) to the second path, others to the
    first."""
    content = decode_json(json_file, msgspec.json.decode)
    os.makedirs(os.path.dirname(paths[0]), exist_ok=True)
    with paused_gc():
        for path, wanted in zip(paths, (False, True), strict=True):
            records = {
                key: [r for r in content[key] if (r[id_] in validation) == wanted]
                for key, id_ in (("images", "id"), ("annotations", "image_id"))
                if key in content
            }
            partial = f"{path}.{secrets.token_hex(4)}.partial"
            Path(partial).write_bytes(msgspec.json.encode(content | records))
            os.replace(partial, path)  # another machine may write the same


def describe_overlap(train: tuple[str, str], val: tuple[str, str]) -> str:
    """What is in two datasets that should have nothing in common, in a sentence; "" for nothing.

    Pictures are the same by their path; and of those with the same name in other directories, a
    sample of those of equal size by their content.

    Args:
        train, val: JSON file and directory of the images.
    """
    if os.path.realpath(train[0]) == os.path.realpath(val[0]):
        return f"{val[0]} is both trained and evaluated on: its AP says nothing of other images"
    theirs, ours = (_paths(*dataset) for dataset in (train, val))
    known = set(theirs)
    if same := [path for path in ours if path in known]:
        return (
            f"{len(same)} of the {len(ours)} images of {val[0]} are trained on, too ({train[0]}), "
            f"the first: {same[0]}: the AP is too high"
        )
    by_name = {os.path.basename(path): path for path in theirs}
    pairs = [(path, by_name.get(os.path.basename(path))) for path in ours]
    pairs = pairs[:: len(pairs) // (10 * _COMPARED) + 1]  # a look at the size costs less
    pairs = [(a, b) for a, b in pairs if b and os.path.isfile(a) and os.path.isfile(b)]
    pairs = [(a, b) for a, b in pairs if os.path.getsize(a) == os.path.getsize(b)]
    pairs = pairs[:: len(pairs) // _COMPARED + 1]
    if same := [(a, b) for a, b in pairs if Path(a).read_bytes() == Path(b).read_bytes()]:
        return (
            f"{len(same)} of {len(pairs)} images of {val[0]} that were compared are trained on, "
            f"too ({train[0]}), the first: {same[0][0]} is {same[0][1]}: the AP is too high"
        )
    return ""


def _paths(json_file: str, image_root: str) -> list[str]:
    root = os.path.realpath(image_root)
    return [os.path.normpath(os.path.join(root, name)) for name in load_coco(json_file).file_names]
