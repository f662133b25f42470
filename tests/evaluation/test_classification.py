import numpy as np
import pytest
import torch

from gn_detect.evaluation.classification import ClassificationEvaluator


@pytest.mark.parametrize("classes", [3, 12])
def test_errors_are_those_of_sorted_scores(classes):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(40, classes)), rng.integers(classes, size=40)
    evaluator = ClassificationEvaluator()
    for _ in range(2):
        evaluator.reset()
        for part in np.array_split(np.arange(40), 3):  # batches of two sizes
            inputs = [{"label": int(label)} for label in labels[part]]
            evaluator.process(inputs, torch.tensor(scores[part]))
        ranks = (scores > scores[np.arange(40), labels][:, None]).sum(1)  # of the true class
        assert evaluator.evaluate() == {
            "classification": {
                "top1_error": pytest.approx(100 * (ranks > 0).mean()),
                "top5_error": pytest.approx(100 * (ranks > 4).mean()),
            }
        }
