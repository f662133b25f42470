"""Pre-activation ResNets with GN, of which timm has ImageNet weights."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet

from gn_detect.modeling import GroupNormFactory
from gn_detect.modeling.resnetv2 import BiTStem, DeepStem, PreActBottleneckBlock

_gn = L(GroupNormFactory)(num_groups=32)


def preactivate(model, dataloader, train, *, weights, depth, weight_standardization=""):
    """Put the ResNet of timm's ``weights`` under the FPN, and feed it as it was trained.

    It is Big Transfer's where weights are standardized, otherwise that with the stem of ResNet-D.
    """
    train.init_checkpoint = f"timm://{weights}"
    ws = dict(weight_standardization=weight_standardization)
    deep = not weight_standardization
    bottom_up = model.backbone.bottom_up
    bottom_up.stem = L(DeepStem)(norm=_gn) if deep else L(BiTStem)(**ws)
    bottom_up.stages = L(ResNet.make_default_stages)(
        depth=depth, block_class=PreActBottleneckBlock, norm=_gn, avg_down=deep, **ws
    )
    model.weight_standardization = weight_standardization
    model.input_format = dataloader.train.mapper.image_format = "RGB"
    model.pixel_mean, model.pixel_std = [127.5] * 3, [127.5] * 3
