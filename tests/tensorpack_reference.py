"""What tensorpack names and computes (examples/FasterRCNN, HEAD of 2022), written from its source,
files of which are named here, and from the documentation of TensorFlow's operations."""

import math

import torch
from torch.nn import functional as F
from torchvision.ops import nms

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
RATIOS, SIZES, STRIDES = (0.5, 1.0, 2.0), (32, 64, 128, 256, 512), (4, 8, 16, 32, 64)
CASCADE_WEIGHTS = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))


class State(dict):
    """Names and shapes of the variables of a detector with GN and FPN, or of its ImageNet weights.

    Args:
        detector: else there is the classifier of ImageNet behind the ResNet
            (ppwwyyxx/GroupNorm-reproduce, ImageNet-ResNet-TensorFlow/resnet_model.py).
        suffix: of all names; ``dump_session_params`` (tensorpack/tfutils/varmanip.py) keeps ":0".
    """

    def __init__(
        self,
        *,
        depth=50,
        width=64,
        channels=256,
        fc=1024,
        classes=80,
        cascade=False,
        detector=True,
        suffix=":0",
    ):
        self.suffix = suffix
        self.layer("conv0", (7, 7, 3, width), bias=False)
        self.norm("conv0/gn", width)
        in_channels = width
        for g, blocks in enumerate(BLOCKS[depth]):
            planes = width * 2**g
            for b in range(blocks):
                block = f"group{g}/block{b}"
                shapes = {
                    "conv1": (1, 1, in_channels, planes),
                    "conv2": (3, 3, planes, planes),
                    "conv3": (1, 1, planes, 4 * planes),
                    "convshortcut": (1, 1, in_channels, 4 * planes),
                }
                for conv, shape in shapes.items():
                    if b == 0 or conv != "convshortcut":
                        self.layer(f"{block}/{conv}", shape, bias=False)
                        self.norm(f"{block}/{conv}/gn", shape[-1])
                in_channels = 4 * planes
        if not detector:
            self.layer("linear", (in_channels, 1000))
            return
        for i in range(4):
            self.layer(f"fpn/lateral_1x1_c{i + 2}", (1, 1, 4 * width * 2**i, channels))
            self.norm(f"fpn/gn_c{i + 2}", channels)
            self.layer(f"fpn/posthoc_3x3_p{i + 2}", (3, 3, channels, channels))
            self.norm(f"fpn/gn_p{i + 2}", channels)
        self.layer("rpn/conv0", (3, 3, channels, channels))
        self.layer("rpn/class", (1, 1, channels, len(RATIOS)))
        self.layer("rpn/box", (1, 1, channels, 4 * len(RATIOS)))
        stages = [f"cascade_rcnn_stage{i}" for i in (1, 2, 3)]
        for stage in stages if cascade else ["fastrcnn"]:
            head = f"{stage}/head" if cascade else stage
            for k in range(4):
                self.layer(f"{head}/conv{k}", (3, 3, channels, channels))
                self.norm(f"{head}/gn{k}", channels)
            self.layer(f"{head}/fc", (49 * channels, fc))
            self.layer(f"{stage}/outputs/class", (fc, classes + 1))
            self.layer(f"{stage}/outputs/box", (fc, 4 if cascade else 4 * (classes + 1)))
        for k in range(4):
            self.layer(f"maskrcnn/fcn{k}", (3, 3, channels, channels))
            self.norm(f"maskrcnn/gn{k}", channels)
        self.layer("maskrcnn/deconv", (2, 2, channels, channels), outputs=channels)
        self.layer("maskrcnn/conv", (1, 1, channels, classes))

    def layer(self, name, shape, bias=True, outputs=None):
        """tensorpack/models/conv2d.py, fc.py"""
        self[f"{name}/W{self.suffix}"] = shape
        if bias:
            self[f"{name}/b{self.suffix}"] = (outputs or shape[-1],)

    def norm(self, name, channels):
        """GroupNorm of modeling/backbone.py"""
        for parameter in ("gamma", "beta"):
            self[f"{name}/{parameter}{self.suffix}"] = (channels,)

    def meta(self):
        return {name: torch.empty(shape, device="meta") for name, shape in self.items()}

    def random(self):
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name, shape in self.items():
            value = torch.randn(shape, generator=generator)
            if "/W" in name:
                ins = shape[-1] if "deconv" in name else math.prod(shape[:-1])
                value = (value + 0.3) / math.sqrt(ins)
            else:
                value = 0.2 * value + ("gamma" in name)
            state[name] = value * (0.05 if "rpn/box" in name else 1)  # boxes of a moderate size
        return state


class Reference:
    """The inference graph of ``ResNetFPNModel`` (modeling/generalized_rcnn.py), in float64.

    Args:
        state: the variables.
        groups: of every GN.
        proposals: to keep of an image (``RPN.TEST_PER_LEVEL_NMS_TOPK``, which is also that of each
            level).
    """

    def __init__(self, state, groups=32, proposals=1000):
        self.state = {n.removesuffix(":0"): value.double() for n, value in state.items()}
        self.groups, self.proposals = groups, proposals
        self.cascade = "cascade_rcnn_stage1/outputs/box/W" in self.state

    def conv(self, x, name, stride=1, pad="SAME"):
        """tf.nn.conv2d: output[i, j] is the sum over di, dj of input[stride * i + di, ...] times
        filter[di, dj]. SAME pads a stride of 1 only here."""
        filters = self.state[f"{name}/W"]
        size = len(filters)
        if pad == "SAME":
            x = F.pad(x, [(size - 1) // 2] * 4)
        rows, columns = ((side - size) // stride + 1 for side in x.shape[2:])
        out = 0
        for di in range(size):
            for dj in range(size):
                part = x[:, :, di:, dj:][:, :, ::stride, ::stride][:, :, :rows, :columns]
                out = out + torch.einsum("nqij,qk->nkij", part, filters[di, dj])
        bias = self.state.get(f"{name}/b")
        return out if bias is None else out + bias[:, None, None]

    def fully_connected(self, x, name):
        return x.flatten(1) @ self.state[f"{name}/W"] + self.state[f"{name}/b"]

    def group_norm(self, x, name):
        """GroupNorm of modeling/backbone.py"""
        grouped = x.unflatten(1, (self.groups, -1))
        mean = grouped.mean((2, 3, 4), keepdim=True)
        variance = ((grouped - mean) ** 2).mean((2, 3, 4), keepdim=True)
        x = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        gamma, beta = (self.state[f"{name}/{p}"][:, None, None] for p in ("gamma", "beta"))
        return gamma * x + beta

    def conv_gn(self, x, name, **kwargs):
        """Conv2D of ``backbone_scope``, before its ReLU"""
        return self.group_norm(self.conv(x, name, **kwargs), f"{name}/gn")

    def preprocess(self, image):
        """``image_preprocess`` of an image of cv2.imread, (H, W, 3) of BGR."""
        mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[:, [2, 1, 0]]
        return ((image - mean.double()) / std.double()).permute(2, 0, 1)[None]

    def backbone(self, image):
        """``resnet_fpn_backbone`` with TF_PAD_MODE False, whose ``maybe_reverse_pad(a, b)`` is
        [b, a]; tf.pad fills with 0, also before pool0."""
        height, width = image.shape[2:]
        add_h, add_w = -height % 32, -width % 32
        x = F.pad(image, [3, 2 + add_w, 3, 2 + add_h])
        x = self.conv_gn(x, "conv0", stride=2, pad="VALID").relu()
        x = F.max_pool2d(F.pad(x, [1, 0, 1, 0]), 3, stride=2)
        stages, group = [], 0
        while f"group{group}/block0/conv1/W" in self.state:
            block = 0
            while f"group{group}/block{block}/conv1/W" in self.state:
                x = self.bottleneck(
                    x, f"group{group}/block{block}", 2 if group and not block else 1
                )
                block += 1
            stages.append(x)
            group += 1
        return stages

    def bottleneck(self, x, name, stride):
        """``resnet_bottleneck`` with STRIDE_1X1 False"""
        out = self.conv_gn(x, f"{name}/conv1").relu()
        if stride == 2:
            out = F.pad(out, [1, 0, 1, 0])
            out = self.conv_gn(out, f"{name}/conv2", stride=2, pad="VALID").relu()
        else:
            out = self.conv_gn(out, f"{name}/conv2").relu()
        out = self.conv_gn(out, f"{name}/conv3")
        if f"{name}/convshortcut/W" in self.state:
            x = self.conv_gn(x, f"{name}/convshortcut", stride=stride)
        return (out + x).relu()

    def fpn(self, stages):
        """``fpn_model`` of modeling/model_fpn.py: P2 to P6."""
        laterals = [
            self.group_norm(self.conv(c, f"fpn/lateral_1x1_c{i}"), f"fpn/gn_c{i}")
            for i, c in enumerate(stages, start=2)
        ]
        sums = [laterals[-1]]
        for lateral in laterals[-2::-1]:
            sums.append(lateral + sums[-1].repeat_interleave(2, 2).repeat_interleave(2, 3))
        outs = [
            self.group_norm(self.conv(x, f"fpn/posthoc_3x3_p{i}"), f"fpn/gn_p{i}")
            for i, x in enumerate(sums[::-1], start=2)
        ]
        return [*outs, outs[-1][:, :, ::2, ::2]]

    def rpn_head(self, x):
        """modeling/model_rpn.py: scores (A,) and deltas (A, 4) of a level."""
        x = self.conv(x, "rpn/conv0").relu()
        scores, deltas = self.conv(x, "rpn/class"), self.conv(x, "rpn/box")
        return scores.permute(0, 2, 3, 1).flatten(), deltas.permute(0, 2, 3, 1).reshape(-1, 4)

    def anchors(self, level, height, width):
        """``get_all_anchors``, (A, 4)"""
        w = torch.tensor([math.sqrt(SIZES[level] ** 2 / r) for r in RATIOS], dtype=torch.float64)
        h = w * torch.tensor(RATIOS, dtype=torch.float64)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) * STRIDES[level]
        return (shifts + 0.5 * torch.stack([-w, -h, w, h], 1)).reshape(-1, 4)

    def decode(self, deltas, boxes):
        """``decode_bbox_target`` of modeling/model_box.py, of (..., 4)"""
        x1, y1, x2, y2 = boxes.unbind(-1)
        tx, ty, tw, th = deltas.unbind(-1)
        clip = math.log(1344 / 16)
        w, h = tw.clamp(max=clip).exp() * (x2 - x1), th.clamp(max=clip).exp() * (y2 - y1)
        x, y = tx * (x2 - x1) + (x1 + x2) / 2, ty * (y2 - y1) + (y1 + y2) / 2
        return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)

    def clip(self, boxes, size):
        height, width = size
        limits = torch.tensor([width, height, width, height], dtype=torch.float64)
        return boxes.clamp(min=0).minimum(limits)

    def generate_proposals(self, levels, size):
        """``generate_fpn_proposals`` with PROPOSAL_MODE "Level" """
        all_boxes, all_scores = [], []
        for level, x in enumerate(levels):
            scores, deltas = self.rpn_head(x)
            boxes = self.decode(deltas, self.anchors(level, *x.shape[2:]))
            scores, kept = scores.topk(min(self.proposals, len(scores)))
            boxes = self.clip(boxes[kept], size)
            kept = nms(boxes, scores, 0.7)
            all_boxes.append(boxes[kept])
            all_scores.append(scores[kept])
        boxes, scores = torch.cat(all_boxes), torch.cat(all_scores)
        return boxes[scores.topk(min(self.proposals, len(scores))).indices]

    def crop_and_resize(self, x, boxes, size):
        """tf.image.crop_and_resize of (C, H, W) by (N, 4) of y1, x1, y2, x2 from 0 to 1; 0 beyond
        the image (tensorflow/core/kernels/image/crop_and_resize_op.cc)."""
        height, width = x.shape[1:]
        steps = torch.arange(size, dtype=torch.float64) / (size - 1)
        ys, xs = (
            (boxes[:, i, None] + (boxes[:, i + 2] - boxes[:, i])[:, None] * steps) * (side - 1)
            for i, side in ((0, height), (1, width))
        )
        inside = ((ys >= 0) & (ys <= height - 1))[:, :, None] & ((xs >= 0) & (xs <= width - 1))[
            :, None
        ]
        ys, xs = ys.clamp(0, height - 1), xs.clamp(0, width - 1)
        dy, dx = (ys - ys.floor())[:, :, None], (xs - xs.floor())[:, None]

        def at(rows, columns):
            return x[:, rows.long()[:, :, None], columns.long()[:, None]]

        top = at(ys.floor(), xs.floor()) * (1 - dx) + at(ys.floor(), xs.ceil()) * dx
        bottom = at(ys.ceil(), xs.floor()) * (1 - dx) + at(ys.ceil(), xs.ceil()) * dx
        return ((top * (1 - dy) + bottom * dy) * inside).transpose(0, 1)

    def roi_align(self, x, boxes, resolution):
        """``roi_align`` and ``crop_and_resize`` of modeling/model_box.py, (N, C, s, s)"""
        x, boxes = F.pad(x, [1] * 4, mode="replicate")[0], boxes + 1
        samples, (height, width) = 2 * resolution, x.shape[1:]
        spacing_w = (boxes[:, 2] - boxes[:, 0]) / samples
        spacing_h = (boxes[:, 3] - boxes[:, 1]) / samples
        nx0 = (boxes[:, 0] + spacing_w / 2 - 0.5) / (width - 1)
        ny0 = (boxes[:, 1] + spacing_h / 2 - 0.5) / (height - 1)
        nw = spacing_w * (samples - 1) / (width - 1)
        nh = spacing_h * (samples - 1) / (height - 1)
        boxes = torch.stack([ny0, nx0, ny0 + nh, nx0 + nw], 1)
        return F.avg_pool2d(self.crop_and_resize(x, boxes, samples), 2)

    def pool(self, levels, boxes, resolution):
        """``multilevel_roi_align`` of modeling/model_fpn.py"""
        root = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(4 + torch.log2(root / 224 + 1e-6)).clamp(2, 5).long() - 2
        pooled = boxes.new_zeros(len(boxes), levels[0].shape[1], resolution, resolution)
        for i in range(4):
            which = level == i
            if which.any():
                pooled[which] = self.roi_align(levels[i], boxes[which] / STRIDES[i], resolution)
        return pooled

    def box_head(self, x, stage=None):
        """``fastrcnn_4conv1fc_gn_head`` and ``fastrcnn_outputs`` of modeling/model_frcnn.py: logits
        (N, classes + 1) and deltas (N, classes + 1, 4), or (N, 1, 4)."""
        outputs = f"cascade_rcnn_stage{stage}" if stage else "fastrcnn"
        head = f"{outputs}/head" if stage else outputs
        for k in range(4):
            x = self.group_norm(self.conv(x, f"{head}/conv{k}").relu(), f"{head}/gn{k}")
        x = self.fully_connected(x, f"{head}/fc").relu()
        deltas = self.fully_connected(x, f"{outputs}/outputs/box").unflatten(1, (-1, 4))
        return self.fully_connected(x, f"{outputs}/outputs/class"), deltas

    def mask_head(self, x):
        """``maskrcnn_up4conv_gn_head`` of modeling/model_mrcnn.py: logits (N, classes, 28, 28).
        tf.nn.conv2d_transpose is the gradient of conv2d by its input."""
        for k in range(4):
            x = self.group_norm(self.conv(x, f"maskrcnn/fcn{k}").relu(), f"maskrcnn/gn{k}")
        filters, (n, _, height, width) = self.state["maskrcnn/deconv/W"], x.shape
        out = x.new_zeros(n, filters.shape[2], 2 * height, 2 * width)
        for di in range(2):
            for dj in range(2):
                out[:, :, di::2, dj::2] = torch.einsum("nqij,kq->nkij", x, filters[di, dj])
        x = (out + self.state["maskrcnn/deconv/b"][:, None, None]).relu()
        return self.conv(x, "maskrcnn/conv")

    def classify(self, levels, boxes, size):
        """``FastRCNNHead`` or ``CascadeRCNNHead`` (modeling/model_cascade.py): scores
        (N, classes + 1) and clipped boxes (N, classes + 1, 4)."""
        if not self.cascade:
            logits, deltas = self.box_head(self.pool(levels, boxes, 7))
            weights = torch.tensor([10.0, 10, 5, 5], dtype=torch.float64)
            decoded = self.decode(deltas / weights, boxes[:, None].expand_as(deltas))
            return logits.softmax(1), self.clip(decoded, size)
        scores = 0
        for stage, weights in enumerate(CASCADE_WEIGHTS, start=1):
            logits, deltas = self.box_head(self.pool(levels, boxes, 7), stage)
            boxes = self.decode(deltas[:, 0] / torch.tensor(weights), boxes)
            boxes, scores = self.clip(boxes, size), scores + logits.softmax(1) / 3
        return scores, boxes[:, None].expand(-1, scores.shape[1], -1)

    def detect(self, image):
        """``fastrcnn_predictions`` and the masks: boxes (K, 4), scores, labels from 1, and mask
        probabilities (K, 28, 28)."""
        size = image.shape[:2]
        levels = self.fpn(self.backbone(self.preprocess(image)))
        scores, boxes = self.classify(levels, self.generate_proposals(levels, size), size)
        found = []
        for label in range(1, scores.shape[1]):
            ours = scores[:, label] > 0.05
            kept = nms(boxes[ours, label], scores[ours, label], 0.5)
            found += [
                (score, box, label)
                for score, box in zip(
                    scores[ours, label][kept], boxes[ours, label][kept], strict=True
                )
            ]
        found = sorted(found, key=lambda detection: -detection[0])[:100]
        scores, boxes = (torch.stack(x) for x in list(zip(*found, strict=True))[:2])
        labels = torch.tensor([label for _, _, label in found])
        masks = self.mask_head(self.pool(levels, boxes, 14)).sigmoid()
        return boxes, scores, labels, masks[torch.arange(len(labels)), labels - 1]
