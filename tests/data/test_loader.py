import itertools

import pytest
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler

from gn_detect.data.loader import ResumableTrainingSampler

SIZES = [(100, 60), (60, 100), (50, 50), (120, 40), (40, 120), (30, 90), (90, 30)]
GROUPS = [int(w > h) for w, h in SIZES]


def detectron2_batches(batch_size, seed):
    """The image numbers of the batches that Detectron2's own loader makes."""
    images = (
        {"width": SIZES[i][0], "height": SIZES[i][1], "id": i}
        for i in TrainingSampler(len(SIZES), seed=seed)
    )
    for batch in AspectRatioGroupedDataset(images, batch_size):
        yield [d["id"] for d in batch]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 25])
def test_the_batches_of_detectron2_from_any_on(batch_size, start):
    sampler = ResumableTrainingSampler(GROUPS, batch_size, seed=5)
    sampler.start = start
    indices = list(itertools.islice(sampler, 12 * batch_size))
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    expected = itertools.islice(detectron2_batches(batch_size, 5), start, start + 12)
    assert batches == list(expected)


def test_the_seed_can_be_set_to_that_of_an_earlier_run():
    sampler = ResumableTrainingSampler(GROUPS, 2, seed=5)
    sampler.seed = 6
    expected = ResumableTrainingSampler(GROUPS, 2, seed=6)
    assert list(itertools.islice(sampler, 20)) == list(itertools.islice(expected, 20))
