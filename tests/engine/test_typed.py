"""What is typed on the command line holds, or is refused in a sentence that names it.

The keys are those that a preparation changes, whatever they are: one more is covered by itself.
"""

import re

import pytest
from detectron2.config import CfgNode, LazyConfig
from helpers import ROOT, SQUARE_RLE, CocoFiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import gn_detect
from gn_detect.config import ConfigError, load_config
from gn_detect.data import DataError
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import prepare, prepare_run
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.settings import Settings

YAML = """
_BASE_: {photos!r}
MODEL: {{KEYPOINT_ON: True}}
SOLVER:
  IMS_PER_GPU: 1
  STEPS: [500, 900]
  BASE_LR_END: 0.001
  AMP: {{ENABLED: True}}
  {epochs}
TEST: {{EVAL_PERIOD: 100}}
DATASETS: {{TRAIN: [typed], TEST: [typed]}}
OUTPUT_DIR: {output!r}
"""
EPOCHS = "EPOCHS: 20\n  STEPS_AT: [0.5, 0.9]\n  WARMUP_EPOCHS: 3"
LAZY = """
from detectron2.config import LazyConfig

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load(
    {keypoints!r}, ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
dataloader.train.dataset.names = dataloader.test.dataset.names = "typed"
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.keypoint_hflip_indices = None
model.roi_heads.num_classes = model.roi_heads.keypoint_head.num_keypoints = None
train.update(init_checkpoint="", output_dir={output!r}, ims_per_gpu=1, eval_period=100)
train.amp.enabled = True
{epochs}
"""
# What is stated in a file, and typed: scaled; in epochs; a typed length in place of a file's.
SCENARIOS = [("", []), (EPOCHS, []), (EPOCHS, [("SOLVER.EPOCHS", 1)])]
LAZY_EPOCHS = "train.update(epochs=20, warmup_epochs=3, eval_epochs=1)"
LAZY_SCENARIOS = [("", []), (LAZY_EPOCHS, []), (LAZY_EPOCHS, [("train.epochs", 1)])]


# Lists of calls, which a saved config has by name.
CALLS = {f"dataloader.{split}.mapper.augmentations" for split in ("train", "test")}


class Kind:
    """YAML or lazy: loads a config with what is typed, and prepares it."""

    def __init__(self, directory, text, scenarios, suffix, **names):
        self.files, self.lazy = [], suffix == ".py"
        for i, (epochs, typed) in enumerate(scenarios):
            path = directory / f"{i}{suffix}"
            path.write_text(text.format(epochs=epochs, output=str(directory / "out"), **names))
            self.files.append((str(path), typed))

    def load(self, file, typed):
        if self.lazy:
            return load_lazy_config(file, [f"{key}={quoted(value)}" for key, value in typed])
        return load_config(file, [word for pair in typed for word in pair])

    def values(self, cfg):
        return dict(flat(cfg if isinstance(cfg, CfgNode) else OmegaConf.to_container(cfg)))

    def prepare(self, file, typed):
        """The values of all keys before and after."""
        cfg = self.load(file, typed)
        before = self.values(cfg)
        options = {"typed": [key for key, _ in typed], "recipe": not self.lazy}
        prepare_run(cfg, **options)
        after = self.values(cfg)
        prepare_run(cfg, **options)
        assert changed(after, self.values(cfg)) == {}  # to prepare it again changes nothing
        return before, after


def changed(before, after):
    return {k: (before.get(k), value) for k, value in after.items() if before.get(k) != value}


def quoted(value):
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, tuples(value)


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Of data with keypoints of their own, and masks as RLE; 2 of its 3 images are trained on."""
    directory = tmp_path_factory.mktemp("typed")
    files = CocoFiles(directory / "data")
    for category in files.content["categories"]:
        category["keypoints"] = ["nose", "left_eye", "right_eye"]
    for annotation in files.content["annotations"]:
        annotation["keypoints"] = [12, 14, 2] * 3
    files.content["annotations"][0]["segmentation"] = SQUARE_RLE
    files.content["annotations"].pop()
    files.write()
    register_coco_json("typed", str(files.json_file), str(files.image_root))
    photos = gn_detect.get_config_file("quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml")
    keypoints = gn_detect.get_config_file("lazy/COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        for name in ("check_recipe", "describe_data", "claim_output", "resolve_memory"):
            # They take long, and derive nothing of what a number states.
            patch.setattr(prepare, name, lambda *_, **__: None, raising=False)
        yield [
            Kind(directory, YAML, SCENARIOS, ".yaml", photos=photos),
            Kind(directory, LAZY, LAZY_SCENARIOS, ".py", keypoints=keypoints),
        ]


class Derived:
    """What runs derive: ``cases`` has (kind, file, what is typed, key, before, after), and ``door``
    the names and keys that have gone through it."""

    def __init__(self, kinds):
        self.cases, self.door = [], set()
        derive = Settings.derive

        def record(run, name, *args, **kwargs):
            self.door.update({name, run.keys[name]})
            return derive(run, name, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Settings, "derive", record)
            for kind, file, typed in [(k, *case) for k in kinds for case in k.files]:
                values = changed(*kind.prepare(file, typed))
                self.cases += [(kind, file, typed, key, *pair) for key, pair in values.items()]


@pytest.fixture(scope="module")
def derived(kinds):
    return Derived(kinds)


def test_all_that_is_derived_goes_through_the_door(derived):
    assert {key for _, _, _, key, *_ in derived.cases} <= derived.door
    source = "".join(path.read_text() for path in (ROOT / "gn_detect").rglob("*.py"))
    assert set(re.findall(r"\.derive\(\s*\"(\w+)\"", source)) <= derived.door  # else add a scenario
    assert {
        "SOLVER.MAX_ITER",
        "train.max_iter",
        "MODEL.DEVICE",
        "INPUT.MASK_FORMAT",
    } <= derived.door


def like(before, after):
    """Values of the type of a key."""
    kind, either = type(after), st.sampled_from([before, after])
    numbers = {bool: st.booleans(), int: st.integers(-1, 400), float: st.floats(0.001, 3)}
    if kind is tuple:
        return either | st.lists(numbers.get(type((*after, 0)[0]), st.nothing()), max_size=4)
    return either | numbers.get(kind, st.nothing())


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_typed_holds(derived, data):
    keys = sorted({(kind.lazy, key) for kind, _, _, key, *_ in derived.cases})
    drawn = data.draw(st.sampled_from(keys))
    cases = [case for case in derived.cases if (case[0].lazy, case[3]) == drawn]
    kind, file, base, key, *pair = data.draw(st.sampled_from(cases))
    value = tuples(data.draw(like(*pair)))
    typed = [*base, (key, value)]
    try:
        _, after = kind.prepare(file, typed)
    except (ConfigError, DataError) as error:
        assert key in str(error)
    else:
        assert after[key] == value or value in (None, "auto")


def test_a_saved_config_is_of_the_run(kinds, tmp_path):
    """A run from it is the same: nothing is scaled twice."""
    for kind in kinds:
        length = ("train.max_iter", 20) if kind.lazy else ("SOLVER.MAX_ITER", 20)
        for file, typed in [*kind.files, (kind.files[0][0], [length])]:
            cfg = kind.load(file, typed)
            prepare_run(cfg, typed=[key for key, _ in typed])
            saved = tmp_path / "config.yaml"
            if kind.lazy:
                LazyConfig.save(cfg, str(saved))
            else:
                saved.write_text(cfg.dump())
            again = kind.load(str(saved), [])
            prepare_run(again)
            keys = set(changed(kind.values(cfg), kind.values(again)))
            assert {key for key in keys if "_target_" not in key} <= CALLS
