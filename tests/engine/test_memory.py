"""What a step needs, what there is, and what is made of it."""

import logging
import resource

import pytest
import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from helpers import TINY, config
from torch._subclasses.fake_tensor import FakeTensorMode

from gn_detect.benchmark.detectors import Settings as Batched
from gn_detect.benchmark.detectors import synthetic_batch
from gn_detect.config import ConfigError, load_config
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import free_memory, memory
from gn_detect.engine.errors import sentence
from gn_detect.engine.free_memory import available_memory
from gn_detect.engine.guards import without_weights
from gn_detect.engine.memory import largest_batch, resolve_memory
from gn_detect.engine.step_memory import Allocations, Batch, StepMemory, estimate_step
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]  # fewer layers to wait for
GIB = 2**30


def run_of(*opts, typed=()):
    return Settings(config(MASK_RCNN, *TINY, *opts), typed)


# --- the step ---


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.no_grad], ids=["fake", "real"])
def test_allocations_by_hand(mode):
    """Of 1000 bytes each: a and b live together, then b and c, then c alone."""
    memory = Allocations()
    with mode(), memory:
        a = torch.zeros(250)
        b = a + 1
        b.view(50, 5).add_(1)
        assert (memory.live, memory.peak) == (2000, 2000)
        del a
        c = b * 2
        assert (memory.live, memory.peak) == (2000, 2000)
        del b
        assert (memory.live, memory.peak, len(c)) == (1000, 2000, 250)


def test_convolutions_of_the_cpu_copy_what_they_read_and_write():
    memory = Allocations(workspace=True)
    with FakeTensorMode(), memory, torch.no_grad():
        x, weight = torch.zeros(1, 2, 8, 8), torch.zeros(4, 2, 1, 1)
        torch.conv2d(x, weight)
    tensors = 4 * (2 * 64 + 8 + 4 * 64)
    assert memory.peak == 2 * tensors


@pytest.mark.parametrize("mode", ["fast", "checkpoint"])
def test_a_step_on_fake_tensors_needs_what_a_real_one_does(mode):
    """The bytes of a real step, whose proposals and samples follow from values, counted alike."""
    run = run_of("MODEL.GN.MEMORY", mode, "MODEL.BACKBONE.FREEZE_AT", 0)
    size, images, rois = (128, 160), 2, 16
    data = synthetic_batch(Batched(images=images, size=size, rois=rois))
    memory = Allocations(workspace=True)
    with memory:
        model = build_model(run.cfg).train()
        optimizer, weights = build_optimizer(run.cfg, model), memory.live
        for _ in range(2):
            optimizer.zero_grad()
            memory.peak = memory.live
            with EventStorage():
                sum(model(data).values()).backward()
            optimizer.step()
    step = estimate_step(run, Batch(images, size, objects=rois // 4))
    assert step.weights == pytest.approx(weights, rel=1e-3)  # some are made of lists
    assert step.optimizer == sum(4 * p.numel() for p in model.parameters())
    assert step.total == pytest.approx(memory.peak, rel=0.05)


def test_what_adds_to_a_step():
    def needs(*opts, images=1, processes=1):
        return estimate_step(run_of(*opts), Batch(images, (64, 96)), processes)

    alone, two = needs(), needs(images=2)
    assert two.maps > 1.8 * alone.maps
    averaged = needs("SOLVER.EMA.ENABLED", True, processes=2)
    gradients = averaged.total - alone.total - alone.weights
    assert gradients == alone.optimizer < alone.weights  # some of them are frozen
    assert 0 < needs("SOLVER.ACCUMULATE_STEPS", 2).total - alone.total <= gradients


def test_gray_images_have_one_channel():
    size, gray = Batch(1, (64, 96)), ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0])
    step = estimate_step(run_of(*gray, "MODEL.PIXEL_STD", [57.0]), size)
    assert 0 < step.weights < estimate_step(run_of(), size).weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml",
        "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_1x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_1x.yaml",
    ],
)
def test_detectors_of_all_kinds(name):
    run = Settings(config(name, *R18))
    step = estimate_step(run, Batch(1, (64, 64), 5, bitmasks=True))
    model = without_weights(lambda _: build_model(run.cfg))
    weights = sum(4 * p.numel() for p in model.parameters())
    assert step.weights == pytest.approx(weights, rel=1e-3)
    assert step.maps > 2**20


# --- what there is ---


def test_available_memory_of_a_process(monkeypatch):
    """The limit of its addresses, and what of the machine is its part."""
    free, total = available_memory("cpu")
    assert 0 < free < total
    assert available_memory("cpu", processes_here=4)[0] == pytest.approx(free / 4, rel=0.1)
    used = free_memory.numbers("/proc/self/status")["VmSize"] * 1024
    limits = {resource.RLIMIT_AS: used + free_memory._ADDRESSES + 5000 * 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, -1), -1))
    free, total = available_memory("cpu", processes_here=4)
    assert total == limits[resource.RLIMIT_AS]
    assert 0 <= free <= 5000 * 1024


def test_control_groups(tmp_path):
    def group(path, **files):
        (tmp_path / path).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("__", ".")).write_text(str(text))

    groups = tmp_path / "groups"
    stat = {"memory__stat": "anon 5\ninactive_file 100\n"}
    group("a/b", memory__max="max", memory__current=400, **stat)
    (tmp_path / "a/memory.max").write_text("1000")
    (tmp_path / "a/memory.current").write_text("600")
    (tmp_path / "a/memory.stat").write_text("inactive_file 100\n")
    groups.write_text("0::/a/b\n")
    assert free_memory._control_groups(str(tmp_path), str(groups)) == [(500, 1000)]
    limit = {"memory__limit_in_bytes": 3000, "memory__usage_in_bytes": 1000}
    group("memory", **limit, memory__stat="total_inactive_file 200\n")
    groups.write_text("3:cpu:/x\n5:memory,hugetlb:/outside\n")
    assert free_memory._control_groups(str(tmp_path), str(groups)) == [(2200, 3000)]
    assert free_memory._control_groups(str(tmp_path), str(tmp_path / "absent")) == []


# --- the largest batch ---


@pytest.fixture
def landscape_and_portrait(coco_files):
    sizes = [(300, 400), (500, 300), (100, 400)]  # height, width
    for image, (height, width) in zip(coco_files.content["images"], sizes, strict=True):
        image.update(height=height, width=width)
    coco_files.content["annotations"] = (
        3 * coco_files.content["annotations"][:1] + (coco_files.content["annotations"][1:])
    )
    for i, annotation in enumerate(coco_files.content["annotations"]):
        annotation["id"] = i + 1
    coco_files.write()
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    return ["own"]


def test_the_largest_batch(landscape_and_portrait):
    """With edges of 200 and 400 at most: (200, 267), (333, 200) and (100, 400)."""
    sizes = ["INPUT.MIN_SIZE_TRAIN", (100, 200), "INPUT.MAX_SIZE_TRAIN", 400]
    batch = largest_batch(run_of(*sizes), landscape_and_portrait)
    assert batch(1) == Batch(1, (333, 200), objects=3, bitmasks=False)
    assert batch(2) == Batch(2, (200, 400), objects=3, bitmasks=False)
    mixed = largest_batch(
        run_of(*sizes, "DATALOADER.ASPECT_RATIO_GROUPING", False), landscape_and_portrait
    )
    assert mixed(2).size == (333, 400)
    jitter = ["INPUT.LSJ.ENABLED", True, "INPUT.LSJ.IMAGE_SIZE", 512]
    assert largest_batch(run_of(*jitter), landscape_and_portrait)(2) == Batch(
        2, (512, 512), objects=3, bitmasks=True
    )
    crop = largest_batch(run_of(*sizes, "INPUT.CROP.ENABLED", True), landscape_and_portrait)
    assert sorted(crop(1).size) == [200, 400] and crop(1).bitmasks
    pasted = run_of(*sizes, "INPUT.COPY_PASTE.ENABLED", True)  # as many as in another image
    assert largest_batch(pasted, landscape_and_portrait)(1) == Batch(1, (333, 200), 6, True)
    for crop in (False, True):
        files = run_of("INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.CROP.ENABLED", crop)
        assert largest_batch(files, landscape_and_portrait)(1).size == (500, 300)
    assert sorted(largest_batch(run_of(*sizes))(1).size) == [200, 400]  # no data that we know


# --- what is made of it ---

NEEDS = {"fast": 4.0, "lean": 2.0, "checkpoint": 1.0}  # GiB of an image of 1000x1000 pixels


@pytest.fixture
def machine(monkeypatch):
    """``machine(free)``: so many GiB are free; a step needs ``NEEDS``, and nothing beside."""

    def estimate(run, batch, processes):
        area = batch.size[0] * batch.size[1] / 1e6
        return StepMemory(0, 0, 0, int(NEEDS[run["memory"]] * batch.images * area * GIB), 0)

    monkeypatch.setattr(memory, "estimate_step", estimate)
    monkeypatch.setattr(memory, "_BESIDE", {"cpu": (0, 0.0)})
    monkeypatch.setattr(memory, "spare_the_heap", lambda: spared.append(True))
    spared = []

    def of(free):
        monkeypatch.setattr(memory, "available_memory", lambda *_: (int(free * GIB), 99 * GIB))
        return spared

    return of


SQUARE = ["INPUT.MIN_SIZE_TRAIN", (1000,), "INPUT.MAX_SIZE_TRAIN", 1000]
AUTO = ["SOLVER.IMS_PER_GPU", "auto"]


@pytest.mark.parametrize(
    "free, images, mode",
    [
        (99, 4, "fast"),
        (16 / 0.9 + 0.01, 4, "fast"),
        (16 / 0.9 - 0.01, 3, "fast"),
        (5, 1, "fast"),
        (4.4, 1, "lean"),
        (2.3, 1, "lean"),
        (2.2, 1, "checkpoint"),
    ],
)
def test_the_most_images_that_fit(free, images, mode, machine):
    spared = machine(free)
    run = run_of(*SQUARE, *AUTO, typed=["SOLVER.IMS_PER_GPU"])
    resolve_memory(run, 1)
    assert (run["ims_per_gpu"], run["memory"]) == (images, mode)
    assert bool(spared) == (NEEDS[mode] * images > 0.4 * free)


@pytest.mark.parametrize(
    "opts, processes, images",
    [
        (["SOLVER.IMS_PER_BATCH", 2], 1, 2),
        (["SOLVER.IMS_PER_BATCH", 6], 1, 3),
        (["SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATE_STEPS", "auto"], 2, 3),
        (["SOLVER.IMS_PER_BATCH", 12, "SOLVER.ACCUMULATE_STEPS", 2], 1, 6),
        (["SOLVER.ACCUMULATE_STEPS", 2], 1, 4),
    ],
)
def test_the_images_make_the_iteration_that_is_typed(opts, processes, images, machine):
    machine(99)
    run = run_of(*SQUARE, *AUTO, *opts, typed=[*AUTO[::2], *opts[::2]])
    resolve_memory(run, processes)
    assert run["ims_per_gpu"] == images
    resolve_schedule(run, processes)
    if "SOLVER.IMS_PER_BATCH" in opts:
        assert run["ims_per_batch"] == opts[1]


def test_what_is_typed_holds(machine, caplog):
    """fast, which leaves less than a tenth; and then, where it does not fit, the size that does."""
    typed = ["SOLVER.IMS_PER_GPU", "MODEL.GN.MEMORY"]
    machine(4.4)
    run = run_of(*SQUARE, *AUTO, typed=typed)
    resolve_memory(run, 1)
    assert (run["ims_per_gpu"], run["memory"]) == (1, "fast")
    assert "needs 4.0 of 4.4 GiB" in caplog.text and "fit with 10% to spare" in caplog.text
    machine(2.2)
    side = int(1000 * (2.2 * 0.9 / 4) ** 0.5) // 32 * 32
    message = rf"needs 4.0 of 2.2 GiB .* fast, INPUT.MAX_SIZE_TRAIN {side} lets .*GN.MEMORY to lean"
    with pytest.raises(ConfigError, match=message):
        resolve_memory(run_of(*SQUARE, *AUTO, typed=typed), 1)
    run = run_of(*SQUARE[:2], "INPUT.MAX_SIZE_TRAIN", side, *AUTO, typed=typed)
    resolve_memory(run, 1)
    assert run["ims_per_gpu"] == 1


def test_the_least_is_refused_without_advice_that_is_taken(machine, monkeypatch):
    machine(0.9)
    monkeypatch.setattr(memory, "_BESIDE", {"cpu": (0, 0.5)})
    opts = [*SQUARE, *AUTO, "INPUT.LSJ.ENABLED", True, "INPUT.LSJ.IMAGE_SIZE", 1000]
    with pytest.raises(ConfigError) as error:
        resolve_memory(run_of(*opts), 1)
    side = int(1000 * (0.9 * 0.9 / 1.5) ** 0.5) // 32 * 32
    assert str(error.value) == (
        "a training step of 1 image(s) of up to 1000x1000 needs 1.5 of 0.90 GiB (free, of 99.0): "
        "maps 1.0 GiB, and 0.50 beside. In the memory mode checkpoint, "
        f"INPUT.LSJ.IMAGE_SIZE {side} lets one image fit with 10% to spare. "
        "Numbers in place of auto let it be tried all the same"
    )


def test_stated_numbers_are_warned_of_and_tried(machine, caplog):
    machine(1)
    run = run_of(*SQUARE, "SOLVER.IMS_PER_GPU", 3)
    resolve_memory(run, 1)
    assert (run["ims_per_gpu"], run["memory"]) == (3, "fast")
    assert "3 image(s) of up to 1000x1000 needs 12.0 of 1.0 GiB" in caplog.text
    caplog.clear()
    # The images of a batch are those of all processes and passes; fitting is no warning.
    run = run_of(*SQUARE, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUMULATE_STEPS", 2)
    machine(99)
    with caplog.at_level(logging.INFO, "gn_detect"):
        resolve_memory(run, 2)
    assert "2 image(s)" in caplog.text
    assert [r for r in caplog.records if r.levelno > logging.INFO] == []


def test_the_process_with_the_least_memory_decides(machine, monkeypatch):
    machine(99)
    monkeypatch.setattr(memory.comm, "all_gather", lambda mine: [mine, (10 * GIB, 20 * GIB)])
    run = run_of(*SQUARE, *AUTO)
    resolve_memory(run, 2)
    assert run["ims_per_gpu"] == 2


def test_memory_alone_takes_the_first_mode_that_fits(machine):
    machine(5)
    run = run_of(*SQUARE, "SOLVER.IMS_PER_GPU", 2, "MODEL.GN.MEMORY", "auto")
    resolve_memory(run, 1)
    assert (run["ims_per_gpu"], run["memory"]) == (2, "lean")


def test_a_resumed_run_keeps_what_it_had(machine, tmp_path):
    opts = [*SQUARE, *AUTO, "MODEL.GN.MEMORY", "auto", "OUTPUT_DIR", str(tmp_path)]
    machine(99)
    saved = {"SOLVER": {"IMS_PER_GPU": 1}, "MODEL": {"GN": {"MEMORY": "lean"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    run = run_of(*opts)
    resolve_memory(run, 1, resume=True)
    assert (run["ims_per_gpu"], run["memory"]) == (1, "lean")
    run = run_of(*opts)
    resolve_memory(run, 1)
    assert (run["ims_per_gpu"], run["memory"]) == (4, "fast")
    opts = [*SQUARE, *AUTO, "OUTPUT_DIR", str(tmp_path)]  # which have chosen the mode, too
    for typed, mode in ([], "lean"), (["MODEL.GN.MEMORY"], "fast"):
        run = run_of(*opts, typed=typed)
        resolve_memory(run, 1, resume=True)
        assert (run["ims_per_gpu"], run["memory"]) == (1, mode)


def test_a_model_that_cannot_be_estimated_is_trained(machine, monkeypatch, caplog):
    machine(99)

    def fails(*_):
        raise NotImplementedError("an operation without shapes\nand its traceback")

    monkeypatch.setattr(memory, "estimate_step", fails)
    run = run_of(*AUTO)
    resolve_memory(run, 1)
    assert (run["ims_per_gpu"], run["memory"]) == (1, "fast")
    assert caplog.text.count("no estimate") == 1
    assert "NotImplementedError: an operation without shapes\n" in caplog.text


def test_auto_in_configs(tmp_path, lazy_data):
    """In a file, typed over a number, and a number over it; and nothing else that is no number."""
    file = tmp_path / "auto.yaml"
    file.write_text("SOLVER: {IMS_PER_GPU: auto}\n")
    assert load_config(str(file)).SOLVER.IMS_PER_GPU == "auto"
    assert load_config(str(file), ["SOLVER.IMS_PER_GPU", "2"]).SOLVER.IMS_PER_GPU == 2
    file.write_text("SOLVER: {IMS_PER_GPU: 2}\n")
    assert load_config(str(file), AUTO).SOLVER.IMS_PER_GPU == "auto"
    assert load_config().SOLVER.IMS_PER_GPU == 0
    assert lazy_data("train.ims_per_gpu=auto").train.ims_per_gpu == "auto"
    with pytest.raises(ConfigError, match="not a number"):
        lazy_data("train.ims_per_gpu=many")
    with pytest.raises(ConfigError, match="IMS_PER_GPU is 'many'; it must be"):
        resolve_memory(run_of("SOLVER.IMS_PER_GPU", "many"), 1)


def test_lazy_configs(machine, lazy_data, tmp_path):
    machine(99)
    words = ["train.ims_per_gpu=auto", "model.memory=auto", f"train.output_dir={tmp_path}"]
    run, resumed = Settings(lazy_data(*words)), Settings(lazy_data(*words))
    resolve_memory(run, 1, ["own"])
    assert (run.cfg.train.ims_per_gpu, run.cfg.model.memory) == (4, "fast")
    LazyConfig.save(run.cfg, str(tmp_path / "config.yaml"))
    machine(0)
    resolve_memory(resumed, 1, ["own"], resume=True)
    assert (resumed.cfg.train.ims_per_gpu, resumed.cfg.model.memory) == (4, "fast")


def test_running_out_of_memory_all_the_same_is_a_sentence():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    for found in (error.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")):
        text = sentence(found)
        assert text.startswith("out of memory (")
        assert all(key in text for key in ("SOLVER.IMS_PER_GPU", "MODEL.GN.MEMORY", "INPUT"))
    assert sentence(RuntimeError("shapes cannot be multiplied")) is None
