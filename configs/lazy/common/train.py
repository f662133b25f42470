"""What a run reads under ``train`` (gn_detect.engine.lazy); the keys are Detectron2's where it has
them. Those left out have the defaults of the YAML configs (gn_detect/config.py)."""

from .base import load

train = load("train.py", "train")
train.seed = -1  # negative: another one in each run
train.eval_period = 0  # iterations; 0: evaluate after the last one alone
# optimizer.lr, max_iter and the periods are stated for this many images per iteration.
train.reference_batch_size = 16
# Images of a forward pass of one GPU. If it is positive, dataloader.train.total_batch_size and the
# recipe follow from it by the linear rule (gn_detect/solver/schedule.py).
train.ims_per_gpu = 0
# Forward passes whose gradients are averaged into one iteration; total_batch_size counts the images
# of all of them. "auto", with ims_per_gpu: as many as restore the reference batch.
train.accumulate_steps = None
train.amp.dtype = "float16"  # or "bfloat16"
# GUARDS of gn_detect/config.py, in small letters: few_images=False lets few images pass.
train.guards = dict()

R_50_GN = "catalog://ImageNetPretrained/FAIR/R-50-GN"
