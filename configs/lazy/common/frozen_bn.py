"""GN in FPN and heads alone, on a backbone of frozen BN (GN paper, table 5)."""


def freeze_batch_norm(model, train):
    """Put the ResNet-50 of MSRA, with its BN frozen, under the FPN of ``model``."""
    train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    bottom_up = model.backbone.bottom_up
    bottom_up.stem.norm = bottom_up.stages.norm = "FrozenBN"
    bottom_up.stages.stride_in_1x1 = True  # as these weights were trained
