"""A small classifier in the loop of detectors, and then in a detector."""

import json
import re
import shutil

import pytest
import safetensors
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from engine.trainers import train_lazy
from helpers import TINY, assert_equal, config, run_tool

import gn_detect
from gn_detect.checkpoint import Checkpointer, WeightGuards, read_weights
from gn_detect.config import ConfigError
from gn_detect.data.classes import CLASSES, write_classes
from gn_detect.data.coco import DataError
from gn_detect.data.image_folder import read_image_folder
from gn_detect.engine import follow_data, lazy, memory, prepare_run
from gn_detect.engine.best import Best
from gn_detect.engine.lazy import do_train
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.engine.step_memory import estimate_step
from gn_detect.engine.trainer import build_loop
from gn_detect.settings import Settings

pytestmark = pytest.mark.slow

# A ResNet-50 of 0.1 M parameters, the backbone of helpers.TINY.
CONFIG = """
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from gn_detect.modeling import GroupNormFactory

NAMES = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load({quick!r}, NAMES)
gn = L(GroupNormFactory)(num_groups=4)
model.stem.update(out_channels=16, norm=gn)
model.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=blocks,
        stride_per_block=[1 + (stage > 0), *[1] * (blocks - 1)],
        in_channels=32 * 2**stage // 2,
        bottleneck_channels=8 * 2**stage,
        out_channels=32 * 2**stage,
        stride_in_1x1=False,
        norm=gn,
    )
    for stage, blocks in enumerate([3, 4, 6, 3])
]
for loader in (dataloader.train, dataloader.test):
    loader.num_workers = 0
    loader.dataset.update(num_train=30, num_val=20, image_size=32)
    loader.mapper.augmentations[0].size = 32
dataloader.train.dataset.root, dataloader.test.dataset.root = {train!r}, {val!r}
dataloader.test.mapper.augmentations[1].size = 32
dataloader.train.total_batch_size = train.reference_batch_size = 4
train.max_iter, train.epochs, train.eval_epochs, train.warmup_epochs = 2, 0, 0, 0
train.device, train.report = "cpu", False
"""
QUICK = gn_detect.get_config_file("lazy/quickstart/resnet_18_gn_classes.py")
SHAPES = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The path of a config, and its data."""
    root = tmp_path_factory.mktemp("small")
    write_classes(root / "classes", num_train=30, num_val=20, image_size=32)
    folders = {split: str(root / "classes" / split) for split in ("train", "val")}
    (root / "small.py").write_text(CONFIG.format(quick=QUICK, **folders))
    return root / "small.py"


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """The output of the tool, and its directory."""
    output = tmp_path_factory.mktemp("trained")
    options = ("train.report=True", "train.ema.enabled=True", "train.log_period=1")
    tool = ("lazyconfig_train_net.py", "--config-file", small, f"train.output_dir={output}")
    return run_tool(*tool, *options).stdout, output


def last_metrics(output) -> dict:
    rows = [json.loads(line) for line in (output / "metrics.json").open()]
    return {key: value for row in rows for key, value in row.items()}


def test_it_trains_and_is_evaluated(trained, small):
    shown, output = trained
    assert f"model.num_classes = 10, from the dataset {small.parent / 'classes/train'}" in shown
    metrics = last_metrics(output)
    assert 1 < metrics["total_loss"] < 10
    for kind in ("", "ema/"):
        errors = [metrics[f"{kind}classification/top{k}_error"] for k in (1, 5)]
        assert 100 >= errors[0] >= errors[1] >= 0
    best = min(metrics[f"{kind}classification/top1_error"] for kind in ("", "ema/"))
    with safetensors.safe_open(output / "model_best.safetensors", "pt") as file:
        found = json.loads(file.metadata()["gn_detect.metrics"])
    assert found["classification/top1_error"] == best
    report = (output / "report.html").read_text()
    assert f"<b>{metrics['classification/top1_error']:.1f}</b><span>top-1 error</span>" in report

    again = run_tool(
        *("lazyconfig_train_net.py", "--eval-only", "--config-file", small),
        *(f"train.output_dir={output / 'eval'}", f"train.init_checkpoint={output}/model_final.pth"),
    )
    values = re.findall(r"copypaste: ([\d.]+),([\d.]+)", again.stdout)[-1]
    assert [float(value) for value in values] == [
        round(metrics[f"classification/top{k}_error"], 4) for k in (1, 5)
    ]


def test_its_checkpoint_is_the_weights_of_a_detector(trained, caplog):
    _, output = trained
    path = str(output / "model_final.pth")
    cfg = config(SHAPES, *TINY)
    guards = WeightGuards.from_config(cfg)
    model = build_model(cfg)
    with caplog.at_level("INFO", "gn_detect"):
        Checkpointer(model, guards=guards).load(path)
    expected = torch.load(path, weights_only=True)["model"]
    shown = caplog.text
    assert "unexpected: linear.weight, linear.bias" in shown and "does not say with" not in shown
    assert re.search(r"\| backbone +\| +[\d,]+ \| +100.00 %", shown)
    del expected["linear.weight"], expected["linear.bias"]
    assert_equal(model.backbone.bottom_up.state_dict(), expected)
    assert read_weights(path).origin == Checkpointer(model, guards=guards).origin


@pytest.mark.parametrize(
    "opts, message",
    [
        (["INPUT.FORMAT", "RGB"], "INPUT.FORMAT is RGB, the weights' is BGR"),
        (["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], r"PIXEL_STD is \[1.0.* the weights' is \[57.375"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", True], "STRIDE_IN_1X1 is True, but .* trained with False"),
        (["MODEL.GN.NUM_GROUPS", 8], "8 groups of 2 channels, but .* trained with 4 groups"),
        (["MODEL.GN.WEIGHT_STANDARDIZATION", "authors"], "trained with no Weight Standardization"),
        (["MODEL.RESNETS.DEPTH", 101], "of another backbone"),
    ],
)
def test_a_detector_that_does_not_fit_is_refused(trained, opts, message):
    cfg = config(SHAPES, *TINY, *opts)
    checkpointer = Checkpointer(build_model(cfg), guards=WeightGuards.from_config(cfg))
    with pytest.raises(ConfigError, match=message):
        checkpointer.load(str(trained[1] / "model_final.pth"))


def test_a_resumed_run_equals_the_uninterrupted_one(small, tmp_path):
    def train(output, stop, resume=False):
        options = (f"train.output_dir={tmp_path / output}", "train.max_iter=4")
        options += ("train.accumulate_steps=2", "train.ema.enabled=True")
        cfg = load_lazy_config(str(small), options)
        return train_lazy(cfg, "model_final", "model_final_ema", stop=stop, resume=resume)

    # A constant rate, so that the first half does not depend on the length of the run.
    small = small.with_name("constant.py")
    small.write_text(CONFIG.format(quick=QUICK, **folders_of(small)) + CONSTANT)
    whole, half = train("whole", 4), train("stopped", 2)
    assert any(not torch.equal(value, whole[key]) for key, value in half.items())
    assert_equal(train("stopped", 4, resume=True), whole)


CONSTANT = "lr_multiplier.scheduler.end_value, lr_multiplier.warmup_length = 1.0, 0.0\n"


def folders_of(path) -> dict[str, str]:
    return {split: str(path.parent / "classes" / split) for split in ("train", "val")}


def test_passes_of_few_images_are_one_of_many(small, tmp_path, monkeypatch):
    """One step on 4 images, by 1, 2 or 4 passes: GN does not see the others."""
    built = []

    def build(*args, **kwargs):
        built[:] = build_loop(*args, **kwargs)
        return built

    monkeypatch.setattr(lazy, "build_loop", build)
    results = []
    for per_pass in (4, 2, 1):
        output = tmp_path / str(per_pass)
        cfg = load_lazy_config(
            str(small),
            [
                *(f"train.output_dir={output}", "train.max_iter=1"),
                *(f"train.ims_per_gpu={per_pass}", "train.accumulate_steps=auto"),
            ],
        )
        cfg.dataloader.train.mapper.augmentations = []
        del cfg.dataloader.evaluator
        prepare_run(cfg)
        seed_all_rng(3)
        do_train(cfg)
        trainer = built[0]
        assert [len(batch) for batch in trainer.batches] == [per_pass] * (4 // per_pass)
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        results.append(torch.cat([g.flatten() for g in gradients]))
    for result in results[1:]:
        assert (result - results[0]).norm() < 1e-5 * results[0].norm()


def test_epochs_are_of_the_folder(small, tmp_path):
    cfg = load_lazy_config(
        str(small),
        [f"train.output_dir={tmp_path}", "train.epochs=4", "train.ims_per_gpu=2"],
    )
    prepare_run(cfg)
    assert cfg.train.max_iter == 4 * 30 / 2 and cfg.optimizer.lr == pytest.approx(0.05 / 2)
    assert cfg.model.num_classes == len(CLASSES)


def test_classes_that_do_not_fit_are_refused(small, tmp_path):
    output = f"train.output_dir={tmp_path / 'out'}"
    with pytest.raises(ConfigError, match="num_classes is 9, but the dataset .* declares 10 class"):
        prepare_run(load_lazy_config(str(small), [output, "model.num_classes=9"]))
    (tmp_path / "val/a").mkdir(parents=True)
    shutil.copy(next((small.parent / "classes/val").rglob("*.jpg")), tmp_path / "val/a")
    cfg = load_lazy_config(str(small), [output])
    cfg.dataloader.test.dataset = L(read_image_folder)(root=str(tmp_path / "val"))
    with pytest.raises(DataError, match="differ in their classes .a, arrow, burst, cross"):
        prepare_run(cfg)


def test_a_machine_with_other_images_is_refused(small, tmp_path, monkeypatch):
    def two(look):
        train, (root, count, classes) = look()
        return {"first": [train, (root, count, classes)], "second": [train, (root, 19, classes)]}

    monkeypatch.setattr(follow_data, "on_each_machine", two)
    with pytest.raises(DataError, match="^second has other images or classes in .*val; copy them"):
        prepare_run(load_lazy_config(str(small), [f"train.output_dir={tmp_path}"]))


def test_the_smaller_error_is_the_better():
    best = Best("classification/top1_error", early_stop=2)
    values = (50.0, 20.0, 30.0, 25.0)
    found = [best.take(i, {best.metric: value}) for i, value in enumerate(values, 1)]
    assert found == [True, True, False, False] and best.stops
    assert best.describe().startswith("classification/top1_error 20.000 of the weights after iter")


def test_the_memory_of_a_step_is_estimated(small):
    run = Settings(load_lazy_config(str(small), ["model.num_classes=10"]))
    batch = memory.largest_batch(run)(4)
    assert (batch.images, batch.size) == (4, (32, 32))
    step = estimate_step(run, batch)  # of fake tensors
    count = sum(p.numel() for p in instantiate(run.cfg.model).parameters())
    assert step.optimizer == 4 * count and step.weights == 4 * (count + 6)
    assert step.maps > 4 * 4 * 16 * 16 * 16  # of the stem alone
