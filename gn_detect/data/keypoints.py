"""Keypoints of a COCO dataset: their names, their skeleton, what a horizontal flip exchanges."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gn_detect.config import ConfigError

from . import DataError
from .coco_data import CocoData
from .coco_file import Category, shown

# Where OKS has no tolerance of its own: the mean of COCO's 17 (pycocotools, Params.setKpParams).
OKS_SIGMA = 0.067

# "left" and "right"; l and r as a word (l_knee, knee.R), before or after one (LKnee, kneeR), and
# in the corners tl, tr, bl, br.
_SIDE = re.compile(
    r"(?i:left|right)|(?<![^\W\d_])[LRlr](?![^\W\d_])|(?<![^\W\d_])[LRlr](?=[A-Z][a-z])"
    r"|(?<=[a-z])[LR](?![^\W\d_])|(?<=^[tb])[lr]$|(?<=^[TB])[LR]$"
)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


def keypoint_names(data: CocoData) -> list[str]:
    """The names of the keypoints, in the order of their coordinates; their numbers where the file
    has none. Empty without keypoints.

    Raises:
        DataError: ``categories`` do not declare them as such, or not all the same ones, which a
            model has; or annotations have another number of them.
    """
    declared = {c.name: _names(data, c) for c in data.categories if c.keypoints}
    sets = list(dict.fromkeys(declared.values()))
    if len(sets) > 1:
        first, other = (next(n for n, names in declared.items() if names == s) for s in sets[:2])
        raise DataError(
            f"{data.json_file}: the categories {first} and {other} declare different keypoints "
            f"({', '.join(sets[0])} and {', '.join(sets[1])}); a model has one set for all: "
            "declare the same in all, or train one model for each"
        )
    count = data.keypoints.shape[1] // 3
    if not sets:
        return [str(number) for number in range(1, count + 1)]
    if count and count != len(sets[0]):
        raise DataError(
            f"{data.json_file}: its categories declare {len(sets[0])} keypoints "
            f"({', '.join(sets[0])}), its annotations have {count}; make them the same"
        )
    return list(sets[0])


def _names(data: CocoData, category: Category) -> tuple[str, ...]:
    names = category.keypoints
    where = f"{data.json_file}: category {category.id!r} ({category.name})"
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where} has the keypoints {shown(names)}; it must be a list of names")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{where} has two keypoints of the name {twice[0]!r}; rename one of them")
    return tuple(names)


def keypoint_metadata(data: CocoData) -> dict[str, list]:
    """Names, pairs and skeleton as Detectron2's metadata have them; empty without keypoints.

    Raises:
        DataError: see :func:`keypoint_names`.
    """
    names = keypoint_names(data)
    if not names:
        return {}
    pairs = {
        (names[int(a) - 1], names[int(b) - 1]): None
        for c in data.categories
        for a, b in _skeleton(c, names)
    }
    rules = [
        (*pair, tuple(int(255 * x) for x in colorsys.hsv_to_rgb(i / len(pairs), 1, 1)))
        for i, pair in enumerate(pairs)
    ]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": flip_pairs(names),
        "keypoint_connection_rules": rules,
    }


def _skeleton(category: Category, names: list[str]) -> list[list[int]]:
    """The pairs, counted from 1, that name two keypoints."""
    pairs = category.skeleton if isinstance(category.skeleton, list) else []
    numbers = range(1, len(names) + 1)
    return [
        p for p in pairs if isinstance(p, list) and len(p) == 2 and all(n in numbers for n in p)
    ]


def keypoint_warnings(data: CocoData) -> list[str]:
    """
    Returns:
        what of the keypoints can be used, and is probably not meant so.

    Raises:
        DataError: see :func:`keypoint_names`; or they are no pixels.
    """
    names, warnings = keypoint_names(data), []
    if names and not any(c.keypoints for c in data.categories):
        warnings.append(
            f"no category names its {len(names)} keypoints: they are called 1 to {len(names)}"
        )
    for c in data.categories:
        pairs = c.skeleton or []
        if names and pairs != (valid := _skeleton(c, names)):
            warnings.append(
                f"category {c.id!r} ({c.name}) has the skeleton {shown(pairs)}; it must be pairs "
                f"of numbers from 1 to {len(names)}: pictures show {len(valid)} of them"
            )
    visible = (data.keypoints[:, 2::3] > 0).any(axis=1) & ~data.crowd
    objects, labelled = (
        np.bincount(data.category[which], minlength=len(data.categories))
        for which in (~data.crowd, visible)
    )
    bare = [
        c.name for c, n, k in zip(data.categories, objects, labelled, strict=True) if n and not k
    ]
    if bare and visible.any():
        warnings.append(
            f"no object of the categories {', '.join(bare)} has a visible keypoint: theirs are not "
            "trained on, and predicted all the same"
        )
    labelled = data.keypoints[:, 2::3] > 0
    points = np.stack([data.keypoints[:, 0::3], data.keypoints[:, 1::3]], axis=2)[labelled]
    size = np.stack([data.widths, data.heights], axis=1)[data.image[np.nonzero(labelled)[0]]]
    if len(points) > 1 and (points <= 1).all() and (points >= 0).all() and (size > 8).all():
        raise DataError(
            f"{data.json_file}: its keypoints seem to be divided by the size of the image; COCO's "
            "are in pixels: convert them"
        )
    if count := ((points < -1) | (points > size + 1)).any(axis=1).sum():
        warnings.append(
            f"{count} of {len(points)} visible keypoints are outside of their image: they are not "
            "trained on"
        )
    return warnings


def mirrored(name: str) -> str:
    """``name`` with left and right exchanged: right_eye for left_eye, LKnee for RKnee."""

    def other(match: re.Match) -> str:
        word = _OTHER[match[0].lower()]
        return word.upper() if match[0].isupper() else word.title() if match[0].istitle() else word

    return _SIDE.sub(other, name)


def flip_pairs(names: Sequence[str], stated: Any = None) -> list[tuple[str, str]]:
    """The keypoints that a horizontal flip exchanges.

    Args:
        names: of all keypoints.
        stated: pairs of names; None for those that their names tell.

    Raises:
        ConfigError: ``stated`` is no list of pairs of names, each in one pair at most.
    """
    if stated is None:
        pairs = ((name, mirrored(name)) for name in names)
        return [(a, b) for a, b in pairs if a < b and b in names and mirrored(b) == a]
    if not isinstance(stated, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in stated
    ):
        raise ConfigError(
            f"INPUT.KEYPOINT_FLIP_PAIRS is {stated!r}; it must be a list of pairs of names, "
            "such as [['left_eye', 'right_eye']], or []"
        )
    seen = [name for pair in stated for name in pair]
    if unknown := [name for name in seen if name not in names]:
        raise ConfigError(
            f"INPUT.KEYPOINT_FLIP_PAIRS names {unknown[0]!r}, which is no keypoint of the data; "
            f"they are {', '.join(names)}"
        )
    if twice := [name for name in seen if seen.count(name) > 1]:
        raise ConfigError(
            f"INPUT.KEYPOINT_FLIP_PAIRS names {twice[0]!r} twice; name it in one pair"
        )
    return [tuple(pair) for pair in stated]


def flip_indices(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[int]:
    """For each keypoint, the index of the one whose place it takes in a flipped image."""
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return [list(names).index(other.get(name, name)) for name in names]
