"""The images with the most errors, and what they are, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from gn_detect.data.coco_data import CocoData

from .analysis import WorstImage
from .error_kinds import BACKGROUND, BOTH, CLASSIFICATION, DUPLICATE, LOCALIZATION
from .matching import Matches

_WORDS = {
    CLASSIFICATION: "{truth} taken for {name}",
    LOCALIZATION: "{name} badly placed",
    BOTH: "{name} badly placed on another class",
    DUPLICATE: "{name} found again",
    BACKGROUND: "{name} where nothing is",
}


def worst_images(
    data: CocoData,
    matches: Matches,
    kinds: np.ndarray,
    about: np.ndarray,
    confident: np.ndarray,
    names: list[str],
    most: int = 20,
) -> list[WorstImage]:
    """The images with the most errors, missed objects and false results; of as many, those with
    fewer true positives first.

    Args:
        kinds, about: of :func:`.error_kinds.error_kinds`.
        confident: results that are looked at, (D,) bool.
        names: of the classes.
    """
    number = len(data.image_ids)
    wrong, right = confident & matches.false, matches.right(confident)
    not_found = matches.objects & ~right
    false = np.bincount(matches.image[wrong], minlength=number)
    missed, found, objects = (
        np.bincount(matches.object_image[which], minlength=number)
        for which in (not_found, right, matches.objects)
    )
    order = np.lexsort((found, -(missed + false)))[:most]
    worst = []
    for i in order[(missed + false)[order] > 0]:
        reasons = []
        if missed[i]:
            lost = matches.object_category[not_found & (matches.object_image == i)]
            what = _listed(names[c] for c in lost)
            reasons.append(f"{missed[i]} of {objects[i]} objects not found: {what}")
        if false[i]:
            here = np.flatnonzero(wrong & (matches.image == i))
            what = _listed(
                _WORDS[kinds[d]].format(
                    name=names[matches.category[d]],
                    truth=names[matches.object_category[about[d]]],
                )
                for d in here
            )
            reasons.append(f"{false[i]} of {false[i] + found[i]} results false: {what}")
        counts = int(missed[i]), int(false[i])
        image = data.image_ids[i], data.file_names[i]
        worst.append(WorstImage(*image, *counts, "; ".join(reasons)))
    return worst


def _listed(things: Iterable[str], most: int = 3) -> str:
    counts = Counter(things).most_common()
    listed = [f"{count} {thing}" for thing, count in counts[:most]]
    if rest := sum(count for _, count in counts[most:]):
        listed.append(f"{rest} more")
    return ", ".join(listed)
