"""How a classifier is scored."""

from __future__ import annotations

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


class ClassificationEvaluator(DatasetEvaluator):
    """Top-1 and top-5 error in percent: images whose class is not the one with the highest score,
    and not among the five highest."""

    def reset(self) -> None:
        self._found = torch.zeros(3, dtype=torch.int64)  # first, among the five, images

    def process(self, inputs: list[dict], outputs: torch.Tensor) -> None:
        """
        Args:
            inputs: have ``"label"``.
            outputs: scores, (N, classes).
        """
        labels = torch.tensor([x["label"] for x in inputs])
        best = outputs.topk(min(5, outputs.shape[1])).indices.cpu() == labels[:, None]
        self._found += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(labels))])

    def evaluate(self) -> dict:
        """Of all processes: ``{"classification": {"top1_error": ..., "top5_error": ...}}``."""
        first, among, count = sum(comm.all_gather(self._found)).tolist()
        errors = {"top1_error": first, "top5_error": among}
        return {"classification": {k: 100 * (1 - v / max(count, 1)) for k, v in errors.items()}}
