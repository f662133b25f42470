"""Learning rates for 16 images per iteration; 1x is 90000 iterations, about 12 epochs of COCO.

Points of a schedule are kept relative to its length: with another ``train.max_iter`` it is
stretched as a whole, warm-up included.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler


def multi_step(max_iter, milestones, warmup_iters=1000, warmup_factor=0.001):
    """Divide the rate by 10 at each of two milestones, after a linear warm-up; in iterations."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01], milestones=milestones, num_updates=max_iter
        ),
        warmup_factor=warmup_factor,
        warmup_length=warmup_iters / max_iter,
        warmup_method="linear",
    )


lr_multiplier_1x = multi_step(90000, [60000, 80000])
lr_multiplier_2x = multi_step(180000, [120000, 160000])
# Longer ones drop for the last 60000 and 20000 iterations (He et al., "Rethinking ImageNet
# Pre-training", section 4).
lr_multiplier_3x = multi_step(270000, [210000, 250000])
lr_multiplier_6x = multi_step(540000, [480000, 520000])
lr_multiplier_9x = multi_step(810000, [750000, 790000])
