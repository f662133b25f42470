"""torchvision's Mask R-CNN with the recipe of its references/detection/train.py: SGD, 0.02 for 16
images and less in proportion, divided by 10 after 16/26 and 22/26 of the run, images of 800 pixels,
flipped or not."""

import itertools
import time

import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_dtype, to_image

from . import Job, Trained, iterations_within

IMAGES = 2  # of an iteration, as the reference has them for each GPU
WARMUP = 1000  # iterations; no more than the first epoch, nor than a tenth of the run


def read_data(job: Job) -> CocoDetection:
    """Without crowd regions and images that have no objects, as the reference."""
    data = CocoDetection(
        job.train_images,
        job.train_json,
        transforms=v2.Compose(
            [
                v2.ToImage(),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        ),
    )
    objects = {i: [a for a in data.coco.imgToAnns[i] if not a.get("iscrowd")] for i in data.ids}
    data.coco.imgToAnns = objects
    data.ids = [i for i in data.ids if objects[i]]
    return wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels", "masks"))


def train(job: Job) -> Trained:
    data = read_data(job)
    num_classes = max(data.coco.cats) + 1  # labels are the ids of the file
    loader = DataLoader(
        data,
        IMAGES,
        shuffle=True,
        num_workers=job.cores,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
    )

    def fit(iterations: int) -> tuple[torch.nn.Module, list[float]]:
        model = maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=num_classes, **job.options
        )
        model.to(job.device).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        rate = 0.02 * IMAGES / 16
        optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=1e-4)
        warmup = max(1, min(WARMUP, len(loader) - 1, iterations // 10))
        drops = MultiStepLR(optimizer, [iterations * step // 26 for step in (16, 22)])
        schedule = ChainedScheduler([LinearLR(optimizer, 1e-3, total_iters=warmup), drops])
        marks = [time.perf_counter()]
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for images, targets in itertools.islice(batches, iterations):
            images = [image.to(job.device) for image in images]
            targets = [{k: v.to(job.device) for k, v in target.items()} for target in targets]
            loss = sum(model(images, targets).values())
            if not torch.isfinite(loss):  # the reference ends here, too
                raise FloatingPointError(f"the loss is {loss} in iteration {len(marks)}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            marks.append(time.perf_counter())
        return model.eval(), marks

    model, marks = fit(iterations_within(job.seconds, fit(5)[1]))

    def predict(path: str) -> Instances:
        image = to_dtype(to_image(Image.open(path).convert("RGB")), torch.float32, scale=True)
        with torch.no_grad():
            (found,) = model([image.to(job.device)])
        return Instances(
            image.shape[-2:],
            pred_boxes=Boxes(found["boxes"]),
            scores=found["scores"],
            pred_classes=found["labels"],
            pred_masks=found["masks"].squeeze(1) > 0.5,
        )

    return Trained(predict, range(num_classes), len(marks) - 1, IMAGES, marks[-1] - marks[0])
