"""Faster R-CNN on res4: Mask R-CNN without its mask head."""

from .mask_rcnn_c4 import model

del model.roi_heads.mask_head
