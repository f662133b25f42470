"""Other formats of annotations as COCO JSON, and back: ``tools/convert_dataset.py``."""

from .from_coco import from_coco
from .labelme import read_labelme
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["READERS", "from_coco"]
# (folder or data.yaml, folder of the images, split, classes in the order of their ids), the last
# three where the files do not say it -> content of a COCO JSON, and what was lost or changed
READERS = {"yolo": read_yolo, "voc": read_voc, "labelme": read_labelme}
