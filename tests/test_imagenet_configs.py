"""configs/lazy/ImageNet, against torchvision's ResNets and the numbers of the papers."""

import pytest
import torch
import torchvision
from detectron2.config import instantiate
from detectron2.solver import LRMultiplier
from helpers import ROOT
from torch import nn

from gn_detect.checkpoint import WeightGuards
from gn_detect.checkpoint.weight_guards import norms_of
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

PATHS = sorted((ROOT / "configs/lazy/ImageNet").glob("*.py"))
PAPER = next(path for path in PATHS if path.stem == "resnet_50_gn")
every_config = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
IMAGES = 1281167


def load(path, *overrides):
    options = ["train.device=cpu", "model.num_classes=1000", "model.mix=null", *overrides]
    return load_lazy_config(str(path), options)


def build(cfg):
    with torch.device("meta"):
        return instantiate(cfg.model)


@every_config
def test_the_network_is_that_of_its_name(path):
    cfg = load(path)
    depth, norm = path.stem.split("_")[1:3]
    model = build(cfg)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    layers = [m.norm for m in model.modules() if hasattr(m, "norm")]
    assert {type(layer).__name__ for layer in layers} == {
        {"gn": "GroupNorm", "bn": "BatchNorm2d"}[norm]
    }
    assert all(p.requires_grad for p in model.parameters())
    norms, origin = norms_of(model), WeightGuards.from_config(cfg).ours
    if norm == "gn":
        assert norms["num_groups"] == 32
        assert norms["weight_standardization"] == ("authors" if "_ws" in path.stem else "")
    assert origin.stride_in_1x1 == (None if int(depth) < 50 else False)
    assert (origin.input_format, origin.pixel_std) == ("BGR", (57.375, 57.12, 58.395))


def schedule(cfg, epochs, processes=1):
    """Rates and images per iteration of a run on ImageNet, at some epochs."""
    resolve_schedule(Settings(cfg), processes, IMAGES)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2))
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    images, rates = cfg.dataloader.train.total_batch_size, []
    for epoch in epochs:
        scheduler.last_epoch = round(epoch * IMAGES / images)
        rates.append(scheduler.get_lr()[0])
    return rates, cfg.train.max_iter * images / IMAGES, optimizer.param_groups


@pytest.mark.parametrize("options, scale", [([], 1), (["train.ims_per_gpu=4"], 1 / 8)])
def test_the_recipe_of_the_paper(options, scale):
    """Section 4.1: 0.1 for 8 x 32 images, and in proportion for others."""
    cfg = load(PAPER, *options)
    epochs = (0, 1.1, 29.9, 30.1, 59.9, 60.1, 89.9, 90.1, 99.9)
    rates, length, groups = schedule(cfg, epochs, processes=8)
    expected = [0.01, *[0.1] * 2, *[0.01] * 2, *[0.001] * 2, *[0.0001] * 2]
    assert rates == pytest.approx([scale * rate for rate in expected])
    assert length == pytest.approx(100, rel=1e-3)
    assert {group["weight_decay"] for group in groups} == {1e-4}  # of gamma and beta, too
    assert {group["momentum"] for group in groups} == {0.9}
    assert cfg.train.eval_period == pytest.approx(IMAGES / 256 / scale, abs=1)


def test_the_recipe_of_torchvision():
    """references/classification: --lr 0.5 --batch-size 128 on 8 GPUs, --lr-warmup-decay 0.01
    --lr-warmup-epochs 5, cosine, --epochs 600 --weight-decay 2e-5 --norm-weight-decay 0."""
    cfg = load(PAPER.with_stem("resnet_50_gn_600ep"))
    rates, length, groups = schedule(cfg, (0, 5.01, 300, 599.9))
    assert rates == pytest.approx([0.005, 0.5, 0.25, 0], abs=1e-3)
    assert length == pytest.approx(600, rel=1e-3)
    assert [group["weight_decay"] for group in groups] == [2e-5, 0]
    every_32nd = 1 - (1 - 0.99998) * (8 * 128 * 32 / 600)  # --model-ema-decay, its adjust
    assert cfg.train.ema.decay == pytest.approx(every_32nd ** (1 / 32), abs=1e-7)
    train = instantiate(cfg.dataloader.train.mapper)
    image = torch.randint(0, 256, (300, 200, 3), dtype=torch.uint8)
    sizes = set()
    for augmentations in (train, instantiate(cfg.dataloader.test.mapper)):
        out = image.permute(2, 0, 1)
        for augment in augmentations.augmentations:
            out = augment(out)
        assert out.dtype == torch.uint8
        sizes.add(out.shape)
    assert sizes == {(3, 176, 176), (3, 224, 224)}


def test_its_mixing_gives_labels_of_one_sum():
    cfg = load(PAPER.with_stem("resnet_50_gn_600ep"))
    whole = load_lazy_config(str(PAPER.with_stem("resnet_50_gn_600ep")), ["model.num_classes=4"])
    assert cfg.model.mix is None
    mix = instantiate(whole.model.mix)
    torch.manual_seed(0)
    images, labels = mix(torch.rand(6, 3, 8, 8), torch.arange(6) % 4)
    assert images.shape == (6, 3, 8, 8) and labels.shape == (6, 4)
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    assert ((labels > 0).sum(1) == 2).any()
