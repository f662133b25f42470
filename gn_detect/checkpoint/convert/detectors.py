"""What the converters of foreign detectors share: layers renamed by a table, anchors checked, and
the background, which others have as the first class, made the last."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..safe_load import WeightsError

_RPN = "proposal_generator.rpn_head.{}.weight"


def rename(layer: str, layers: Mapping[str, str], first_stage: int = 0) -> str | None:
    """Detectron2's name of a layer; None where it is not among ``layers``.

    Args:
        layers: pattern -> Detectron2's name, in which {k}, {k1} and {k2} are the number k of the
            pattern, and 1 and 2 more; {stage} is "" or, of a Cascade R-CNN, the stage and a dot.
        first_stage: the number of the first stage; 0 in Detectron2.
    """
    for pattern, new in layers.items():
        if match := re.fullmatch(pattern, layer):
            numbers = {name: int(value) for name, value in match.groupdict().items() if value}
            stage = f"{numbers['stage'] - first_stage}." if "stage" in numbers else ""
            more = {f"{name}{i}": number + i for name, number in numbers.items() for i in (1, 2)}
            return new.format(**numbers | more | {"stage": stage})
    return None


def converted(
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str | None],
    library: str,
    *,
    background_first: bool = True,
    common_boxes: int = 4,
    masks_of_background: bool = True,
) -> dict[str, torch.Tensor]:
    """The weights of a detector with Detectron2's names and classes: C, then the background, which
    has neither box nor mask.

    Args:
        state: of the file.
        names: in the file -> Detectron2's, or None where it has none.
        library: whose file it is.
        background_first: it is the first of C + 1 classes in all predictors, not the last in the
            scores alone.
        common_boxes: rows of a box predictor for all classes in common: 4, or 8 with a background.
        masks_of_background: ``background_first`` is true of masks, too.

    Raises:
        WeightsError: layers, anchors or channels have no place in Detectron2's, or two the same.
    """
    if unknown := [name for name, new in names.items() if new is None]:
        raise WeightsError(
            f"{len(unknown)} weights of {library} have no place in Detectron2's R-CNN with FPN: "
            f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}. Convert a network "
            "without these layers"
        )
    originals = {new: name for name, new in names.items()}
    if twice := [name for name, new in names.items() if originals[new] != name]:
        raise WeightsError(
            f"{twice[0]} and {originals[names[twice[0]]]} are one weight of {library}. Take the "
            "other one out of the file"
        )
    result = {new: state[name] for name, new in names.items()}
    _check_anchors(result, originals)
    for name in [n for n in result if re.search(r"box_predictor\.(\d\.)?cls_score\.", n)]:
        boxes, parameter = name.replace("cls_score", "bbox_pred"), name.rpartition(".")[2]
        predictors = [(boxes, 4, common_boxes)]
        if masks_of_background:
            predictors.append((f"roi_heads.mask_head.predictor.{parameter}", 1, 1))
        scores = state[originals[name]]
        for predictor, size, common in predictors:
            if predictor not in result:
                continue
            value = state[originals[predictor]]
            expected = size * (len(scores) - (not background_first))
            if len(value) not in (expected, common):
                raise WeightsError(
                    f"{originals[predictor]} has {len(value)} channels, {originals[name]} has "
                    f"{len(scores)}: expected {expected}, or {common} if all classes have them in "
                    "common"
                )
            if background_first and len(value) != size:
                result[predictor] = value[size:]
        if background_first:
            result[name] = scores.roll(-1, 0)
    return result


def _check_anchors(state: Mapping[str, torch.Tensor], originals: Mapping[str, str]) -> None:
    if not state.keys() >= {_RPN.format("objectness_logits"), _RPN.format("anchor_deltas")}:
        return
    names = [_RPN.format(name) for name in ("objectness_logits", "anchor_deltas")]
    scores, deltas = (len(state[name]) for name in names)
    of = f"{originals[names[0]]} has {scores} channels"
    if deltas != 4 * scores:
        raise WeightsError(
            f"{of}, {originals[names[1]]} has {deltas}: Detectron2's RPN has one score, that of a "
            "sigmoid, and four deltas for each anchor. Convert a detector of such an RPN"
        )
    if scores > 3:  # up to three are of one ratio or of one size: there is no other order
        raise WeightsError(
            f"{of}, one for each anchor. With several sizes on one level their order is not "
            "Detectron2's; up to 3 can be converted"
        )
