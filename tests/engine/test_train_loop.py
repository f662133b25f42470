import functools
import itertools
import math
import re

import pytest
import torch
import torch.distributed as dist
from cluster.processes import SERVER
from detectron2.config import get_cfg
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, launch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import rpn
from detectron2.modeling.roi_heads import roi_heads
from detectron2.modeling.sampling import subsample_labels
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from engine.trainers import (
    SAME_IMAGES,
    TWO_IMAGES,
    build_trainer,
    clone,
    train_and_resume,
    train_seeded_by_image,
    unwrapped,
)
from helpers import TINY, config, record_images, stream
from torch import nn

from gn_detect.engine.train_loop import AccumulatingTrainer


class Regression(nn.Module):
    """A loss that is a mean over images, and one that is a mean of squares of the outputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, batch):
        x, y = (torch.stack(parts) for parts in zip(*batch, strict=True))
        out = self.net(x)
        return {"loss_fit": (out - y).square().mean(), "loss_size": 0.1 * out.square().mean()}


def model(dtype=torch.float32) -> Regression:
    torch.manual_seed(0)
    return Regression().to(dtype)


def images(number: int, dtype=torch.float32) -> list[tuple]:
    torch.manual_seed(1)
    return [(torch.randn(5, dtype=dtype), torch.randn(3, dtype=dtype)) for _ in range(number)]


def batches(data: list, size: int) -> list[list]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def run(trainer: SimpleTrainer, iterations: int) -> dict[str, float]:
    """Train; return the metrics of the last iteration."""
    trainer.train(0, iterations)
    return {name: value for name, (value, _) in trainer.storage.latest().items()}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_gradient_and_metrics_are_those_of_one_large_batch(steps, dtype):
    whole, data = model(dtype), images(6, dtype=dtype)
    losses = whole(data)
    sum(losses.values()).backward()

    accumulating = model(dtype)
    loader = batches(data, 6 // steps)
    metrics = run(AccumulatingTrainer(accumulating, loader, sgd(accumulating), steps), 1)
    for actual, expected in zip(gradients(accumulating), gradients(whole), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-7)
    for name, loss in losses.items():
        assert metrics[name] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["total_loss"] == pytest.approx(sum(losses.values()).item(), rel=1e-5)


def test_one_step_is_that_of_simple_trainer_to_the_bit():
    expected, actual, data = model(), model(), batches(images(8), 2)
    metrics = run(SimpleTrainer(expected, data, sgd(expected)), 4)
    ours = run(AccumulatingTrainer(actual, data, sgd(actual)), 4)
    for key, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value), key
    times = {"data_time", "rank_data_time"}
    assert all(ours[k] == v for k, v in metrics.items() if k not in times)
    assert ours.keys() == metrics.keys()


def test_hooks_and_iterations_count_optimizer_steps():
    calls = []

    class Spy(HookBase):
        def after_backward(self):
            calls.append(("after_backward", self.trainer.iter, len(self.trainer.losses)))

        def after_step(self):
            calls.append(("after_step", self.trainer.iter, len(self.trainer.losses)))

    trained = model()
    optimizer = sgd(trained)
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    trainer = AccumulatingTrainer(trained, batches(images(12), 2), optimizer, 3)
    trainer.register_hooks([Spy()])
    run(trainer, 2)
    assert calls == [
        *(("after_backward", 0, 3), "step", ("after_step", 0, 3)),
        *(("after_backward", 1, 3), "step", ("after_step", 1, 3)),
    ]


def test_the_time_spent_on_data_is_that_of_all_steps(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("gn_detect.engine.train_loop.time.perf_counter", lambda: next(clock))
    trained = model()
    loader = batches(images(6), 2)
    assert run(AccumulatingTrainer(trained, loader, sgd(trained), 3), 1)["data_time"] == 3


def test_one_loss_that_is_no_dict():
    class Plain(Regression):
        def forward(self, batch):
            return super().forward(batch)["loss_fit"]

    torch.manual_seed(0)
    plain = Plain()
    expected = plain(images(4)).item()
    metrics = run(AccumulatingTrainer(plain, batches(images(4), 2), sgd(plain), 2), 1)
    assert metrics["total_loss"] == pytest.approx(expected, rel=1e-5)


def test_no_steps():
    trained = model()
    with pytest.raises(ValueError, match="accumulate_steps is 0; it must be at least 1"):
        AccumulatingTrainer(trained, [], sgd(trained), 0)


def test_processes_exchange_gradients_in_the_last_step_only(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model())
        trainer = AccumulatingTrainer(parallel, batches(images(12), 2), sgd(parallel), 3)
        exchanges = []

        def exchange(state, bucket):
            exchanges.append((trainer.iter, len(trainer.batches)))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, exchange)
        run(trainer, 2)
        assert exchanges == [(0, 3), (1, 3)]
    finally:
        dist.destroy_process_group()


def clipping(model: nn.Module, kind: str, value: float, lr: float) -> torch.optim.Optimizer:
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = value
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(model.parameters(), lr=lr)


@pytest.mark.parametrize("amp_dtype, tolerance", [(None, 1e-4), (torch.float16, 2e-2)])
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_what_is_clipped_is_the_mean_gradient(kind, amp_dtype, tolerance):
    """A clipped sum, a mean of clipped gradients, or clipped scaled ones would differ."""
    whole, data = model(), images(4)
    sum(whole(data).values()).backward()
    limit = 0.05
    expected = []
    for grad in gradients(whole):
        if kind == "norm":
            expected.append(grad * min(1, limit / grad.norm().item()))
        else:
            expected.append(grad.clamp(-limit, limit))
    assert any((e != g).any() for e, g in zip(expected, gradients(whole), strict=True))

    trained = model()
    before = clone(trained)
    optimizer = clipping(trained, kind, limit, lr=1.0)
    run(AccumulatingTrainer(trained, batches(data, 2), optimizer, 2, amp_dtype), 1)
    for (name, after), grad in zip(trained.state_dict().items(), expected, strict=True):
        error = (before[name] - after - grad).norm() / grad.norm()
        assert error < tolerance, name


def test_bfloat16():
    trained, dtypes = model(), []
    trained.net[-1].register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    before = clone(trained)
    expected = sum(trained(images(4)).values()).item()
    dtypes.clear()
    trainer = AccumulatingTrainer(
        trained, batches(images(4), 2), sgd(trained), 2, amp_dtype=torch.bfloat16
    )
    metrics = run(trainer, 1)
    assert dtypes == [torch.bfloat16] * 2
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert {g.dtype for g in gradients(trained)} == {torch.float32}
    assert all((before[k] != v).any() for k, v in trained.state_dict().items())
    assert metrics["total_loss"] == pytest.approx(expected, rel=2e-2)
    assert trainer.grad_scaler is None and "grad_scaler" not in trainer.state_dict()


def test_float16_leaves_out_a_step_whose_gradient_overflows():
    trained, data = model(), images(8)
    # The loss of this image is finite; scaled by 2**16, its gradient overflows in float16.
    data[0] = (data[0][0], torch.full((3,), 1e4))
    trainer = AccumulatingTrainer(
        trained, batches(data, 2), sgd(trained), 2, amp_dtype=torch.float16
    )
    weights = [clone(trained)]
    scales = [trainer.grad_scaler.get_scale()]

    class Remember(HookBase):
        def after_step(self):
            weights.append(clone(trained))
            scales.append(trainer.grad_scaler.get_scale())

    trainer.register_hooks([Remember()])
    run(trainer, 2)
    assert all(torch.equal(weights[0][k], v) for k, v in weights[1].items())
    assert scales[1] == scales[0] / 2 == scales[2]
    assert all((weights[1][k] != v).any() for k, v in weights[2].items())
    # The step that was taken is that of float32.
    whole = model()
    sum(whole(data[4:]).values()).backward()
    for (name, after), grad in zip(weights[2].items(), gradients(whole), strict=True):
        error = (weights[1][name] - after - 0.1 * grad).norm() / (0.1 * grad).norm()
        assert error < 2e-2, name


def test_the_state_of_the_scaler_is_that_of_amp_trainer():
    trained = model()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    state = AMPTrainer(trained, [], sgd(trained), grad_scaler=scaler).state_dict()
    trainer = AccumulatingTrainer(trained, [], sgd(trained), amp_dtype=torch.float16)
    trainer.load_state_dict(state)
    assert trainer.grad_scaler.get_scale() == 128.0
    assert trainer.state_dict().keys() == state.keys()
    assert trainer.state_dict()["grad_scaler"].keys() == state["grad_scaler"].keys()


@pytest.mark.parametrize("old, new", [(None, torch.float16), (torch.float16, None)])
def test_mixed_precision_is_switched_between_runs(old, new):
    trained = model()
    trainer = AccumulatingTrainer(trained, batches(images(4), 2), sgd(trained), amp_dtype=old)
    run(trainer, 2)
    optimizer = sgd(trained)
    other = AccumulatingTrainer(trained, [], optimizer, amp_dtype=new)
    other.load_state_dict(trainer.state_dict())
    for parameter in trained.parameters():
        expected = trainer.optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)


def test_the_check_of_gradients_only_reads_them():
    trained, versions = model(), []
    optimizer = sgd(trained)
    optimizer.register_step_pre_hook(
        lambda *_: versions.append([p.grad._version for p in trained.parameters()])
    )
    loader = batches(images(4), 2)
    run(AccumulatingTrainer(trained, loader, optimizer), 1)
    run(AccumulatingTrainer(trained, loader, optimizer, check_gradients=False), 1)
    assert versions[0] == versions[1]


class Scripted(nn.Module):
    """The loss of an image is what it says, of a weight that is 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch):
        (image,) = batch
        return {"loss_a": image["loss"](self.weight), "loss_b": self.weight + 0.5}


def loss_of(value):
    return lambda weight: 0 * weight + value


def boxes(weight):
    raise FloatingPointError("Predicted boxes contain NaN")


ONE, TWO, NAN, INF = map(loss_of, (1, 2, math.nan, math.inf))
STEEP = torch.sqrt  # its gradient at 0 is infinite
# The loss of each step, of which an iteration has two; cause; losses shown; images
DIVERGED = [
    ([ONE, ONE, NAN, ONE], "a loss is not finite", "losses: loss_a nan", "2.png"),
    ([ONE, ONE, ONE, INF], "a loss is not finite", "losses: loss_a inf", "3.png"),
    ([ONE, ONE, STEEP, ONE], "a gradient is not finite", "losses: loss_a 0.5", "2.png, 3.png"),
    ([ONE, lambda w: 0 * STEEP(w)], "a gradient is not", "losses: loss_a 0.5", "0.png, 1.png"),
    ([boxes], "Predicted boxes", "previous losses: none", "0.png"),
    ([ONE, boxes], "Predicted boxes", "previous losses: loss_a 1", "1.png"),
    ([ONE, TWO, boxes], "Predicted boxes", "previous losses: loss_a 2", "2.png"),
]


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("losses, cause, shown, images", DIVERGED)
def test_a_run_that_diverges_names_the_images_at_fault(losses, cause, shown, images, amp_dtype):
    trained, steps = Scripted(), []
    loader = [[{"file_name": f"{i}.png", "loss": loss}] for i, loss in enumerate(losses)]
    optimizer = sgd(trained, lr=0.0)
    trainer = AccumulatingTrainer(trained, loader, optimizer, 2, amp_dtype, remedy="rest")
    optimizer.register_step_post_hook(lambda *_: steps.append(trainer.iter))
    with pytest.raises(FloatingPointError) as error:
        run(trainer, 2)
    last = (len(losses) - 1) // 2
    sentence = rf"diverged at iteration {last} \({cause}.*\); {shown}[^;]*; images: {images}\. .*"
    assert re.search(f"{sentence} are intact; rest, and look at these images$", str(error.value))
    assert steps == list(range(last))  # that one was not taken


def test_clipping_by_value_mends_an_infinite_gradient():
    steep = Scripted()
    optimizer = clipping(steep, "value", 0.5, lr=1.0)
    run(AccumulatingTrainer(steep, [[{"loss": STEEP}]], optimizer, check_gradients=False), 1)
    assert steep.weight == -0.5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes without CUDA")
def test_two_processes_train_as_two_steps_and_go_on_with_their_random_numbers(
    coco_files, tmp_path, monkeypatch
):
    elastic = build_trainer(coco_files, tmp_path / "elastic", *TWO_IMAGES)
    elastic.max_iter = 1
    elastic.train()

    start = torch.multiprocessing.start_processes
    fork = functools.partial(start, start_method=SERVER.get_start_method())
    monkeypatch.setattr("torch.multiprocessing.start_processes", fork)
    launch(train_and_resume, 2, dist_url="auto", args=(coco_files, tmp_path))

    elastic = build_trainer(coco_files, tmp_path / "elastic", *TWO_IMAGES, resume=True)
    assert elastic.start_iter == 3  # one process, two, and one again
    seen = record_images(elastic)
    elastic.train()
    assert list(itertools.chain(*seen)) == stream(elastic, 6, 8)

    steps = build_trainer(
        coco_files, tmp_path / "steps", *SAME_IMAGES, "SOLVER.ACCUMULATE_STEPS", 2
    )
    before = clone(unwrapped(steps))
    seen = train_seeded_by_image(steps)
    processes = torch.load(tmp_path / "two_processes.pth")
    first, second = processes["seen"]
    assert len(first) == len(second) == 4 and first != second
    assert seen == [image for pair in zip(first, second, strict=True) for image in pair]
    assert any(not torch.equal(value, before[key]) for key, value in processes["model"].items())
    for key, value in clone(unwrapped(steps)).items():
        assert torch.allclose(processes["model"][key], value, rtol=1e-5, atol=1e-5), key


def image(num_objects: int, seed: int) -> dict:
    """A picture of noise with boxes and their masks."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(4, 60, (num_objects, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + 32], dim=1)
    masks = torch.zeros(num_objects, 96, 96, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0 + 4 : y1, x0:x1] = True
    instances = Instances((96, 96), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    instances.gt_classes = torch.zeros(num_objects, dtype=torch.int64)
    pixels = torch.randint(0, 256, (3, 96, 96), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "height": 96, "width": 96}


def test_mask_rcnn_weighs_images_by_the_foreground_in_the_mask_loss_alone(monkeypatch):
    """Two passes of one image against one of two: Detectron2's mask loss is a mean over the
    foreground RoIs of a pass (modeling/roi_heads/mask_head.py), the other losses over images."""
    foreground = []

    def sample(labels, *args):  # the same of an image, in whichever pass
        torch.manual_seed(0)
        positive, negative = subsample_labels(labels, *args)
        foreground.append(len(positive))
        return positive, negative

    monkeypatch.setattr(rpn, "subsample_labels", sample)
    monkeypatch.setattr(roi_heads, "subsample_labels", sample)
    cfg = config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", *TINY)
    torch.manual_seed(0)
    detector = build_model(cfg).train()
    batch = [image(1, seed=1), image(9, seed=2)]

    def gradients(passes, mask_weights):
        """Component -> gradient of the mean over the passes."""
        detector.zero_grad()
        with EventStorage():
            for data, weight in zip(passes, mask_weights, strict=True):
                losses = detector(data)
                losses["loss_mask"] = losses["loss_mask"] * weight
                (sum(losses.values()) / len(passes)).backward()
        parts = {"rpn_head": [], "box_head": [], "mask_head": [], "backbone": []}
        for name, parameter in detector.named_parameters():
            for part in parts:
                if part in name:
                    parts[part].append(parameter.grad.flatten().clone())
        return {part: torch.cat(values) for part, values in parts.items()}

    def differences(mask_weights):
        passes = gradients([[data] for data in batch], mask_weights)
        return {k: ((passes[k] - v).norm() / v.norm()).item() for k, v in whole.items()}

    whole = gradients([batch], [1.0])
    foreground.clear()
    plain = differences([1.0, 1.0])
    one, nine = foreground[1], foreground[3]  # of the RoIs; RPN's come before
    assert 0 < one < nine
    assert plain["rpn_head"] < 1e-5 and plain["box_head"] < 1e-5 and plain["mask_head"] > 0.01
    mean = (one + nine) / 2
    assert max(differences([one / mean, nine / mean]).values()) < 1e-4
