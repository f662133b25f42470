"""SGD as in the GN paper (section 4.2): no weight decay on gamma and beta."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import get_default_optimizer_params

# gn_detect.engine.lazy sets params.model to the model.
optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,  # for 16 images per iteration
    momentum=0.9,
    weight_decay=1e-4,
)
