"""Under autocast to bfloat16, maps stay in bfloat16; parameters and losses are float32."""

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_backbone, build_model
from helpers import TINY, config, randomize, training_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gn_detect.engine.train_loop import AccumulatingTrainer

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"

pytestmark = pytest.mark.slow


class Float32Maps(TorchDispatchMode):
    """The operations that put out maps of ``batch`` images in float32."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch, self.found = batch, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                if tensor.dim() == 4 and len(tensor) == self.batch:
                    self.found.append(str(func))
        return output


@pytest.mark.parametrize(
    "memory, channels_last",
    [("fast", False), ("balanced", True), ("lean", False), ("checkpoint", True)],
)
def test_no_map_of_the_backbone_is_float32(memory, channels_last):
    opts = ("MODEL.GN.MEMORY", memory, "MODEL.CHANNELS_LAST", channels_last)
    torch.manual_seed(0)
    backbone = randomize(build_backbone(config(R18, *opts)))
    images = torch.randn(7, 3, 64, 96)  # no convolution has 7 filters
    with torch.autocast("cpu", torch.bfloat16), Float32Maps(7) as maps:
        outputs = backbone(images).values()
        loss = sum(output.sum() for output in outputs)
        loss.backward()
    assert maps.found == []
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert {p.grad.dtype for p in backbone.parameters()} == {torch.float32}


def test_a_detector_learns_in_bfloat16():
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "INPUT.MASK_FORMAT", "bitmask")

    def losses(amp_dtype, iterations) -> list[float]:
        """Of a batch that it is trained on."""
        torch.manual_seed(0)
        model = build_model(config(R18, *TINY, *opts)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        trainer = AccumulatingTrainer(
            model, [[training_image()]] * iterations, optimizer, amp_dtype=amp_dtype
        )
        totals, hook = [], HookBase()
        hook.after_step = lambda: totals.append(sum(trainer.mean_losses().values()).item())
        trainer.register_hooks([hook])
        trainer.train(0, iterations)
        return totals

    (float32,) = losses(None, 1)
    totals = losses(torch.bfloat16, 12)
    assert totals[0] == pytest.approx(float32, rel=1e-2)
    assert totals[-1] < 0.75 * totals[0]
