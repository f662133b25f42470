"""What the outputs of weights mean, by name, against what the data have: classes and keypoints."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The parameters with a part for each of them, but for those of heads that know no classes.
_PREDICTORS = {
    "classes": re.compile(
        r"roi_heads\.(box_predictor\.(\d\.)?(cls_score|bbox_pred)|mask_head\.predictor)\..*"
        r"|head\.cls_score\..*"
    ),
    "keypoints": re.compile(r"roi_heads\.keypoint_head\.score_lowres\..*"),
}
KINDS = tuple(_PREDICTORS)


def is_predictor(name: str, kind: str) -> bool:
    """Whether the parameter ``name`` of a detector tells those of ``kind`` (in ``KINDS``) apart."""
    return bool(_PREDICTORS[kind].fullmatch(name))


def describe_exchange(kind: str, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """How two lists of as many names differ, in words; "" where they do not, one is not known, or
    their lengths tell.

    Args:
        kind: of ``KINDS``.
        theirs, ours: of the weights and of the data, in order.
    """
    if len(theirs) != len(ours) or list(theirs) == list(ours):
        return ""
    position = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    thing = {"classes": "class", "keypoints": "keypoint"}[kind]
    text = (
        f"{thing} {position + 1} of {len(ours)} is {theirs[position]!r} in the weights, "
        f"{ours[position]!r} in the data"
    )
    if sorted(theirs) == sorted(ours):
        text += f" (the same names in another order: {', '.join(theirs)}, and {', '.join(ours)})"
    return text
