"""Cascade R-CNN with FPN: Cascade Mask R-CNN without its mask head."""

from .cascade_mask_rcnn_fpn import model

for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[_key]
