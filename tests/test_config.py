import pytest
import yaml
from detectron2.config import get_cfg
from helpers import ROOT

import gn_detect
from gn_detect.config import ConfigError, add_gn_config, load_config

CONFIGS = sorted(
    p.relative_to(ROOT / "configs").as_posix()
    for p in (ROOT / "configs").rglob("*.yaml")
    if not p.name.startswith("Base-")
)


def test_defaults():
    cfg = get_cfg()
    add_gn_config(cfg)
    assert (cfg.MODEL.GN.NUM_GROUPS, cfg.MODEL.GN.EPS) == (32, 1e-5)


def test_adding_the_keys_again_keeps_their_values():
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.GN.NUM_GROUPS = 16
    add_gn_config(cfg)
    assert cfg.MODEL.GN.NUM_GROUPS == 16


def test_the_configs_of_the_gn_paper():
    for name, depth, weights in (
        ("mask_rcnn_R_50_FPN_gn_3x", 50, "FAIR/R-50-GN"),
        ("mask_rcnn_R_101_FPN_gn_3x", 101, "FAIR/R-101-GN"),
        ("scratch_mask_rcnn_R_50_FPN_gn_3x", 50, ""),
    ):
        cfg = load_config(gn_detect.get_config_file(f"COCO-InstanceSegmentation/{name}.yaml"))
        assert cfg.MODEL.RESNETS.DEPTH == depth
        assert cfg.MODEL.WEIGHTS == (weights and f"catalog://ImageNetPretrained/{weights}")
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (0.02, 16)
        assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((210000, 250000), 270000)


def test_unknown_config_names_similar_ones():
    with pytest.raises(FileNotFoundError, match="mask_rcnn_R_50_gn.*mask_rcnn_R_50_FPN_gn_3x.yaml"):
        gn_detect.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_gn.yaml")


def test_number_of_classes_is_none_until_stated(tmp_path):
    assert load_config().MODEL.ROI_HEADS.NUM_CLASSES is None
    assert load_config("", ["MODEL.ROI_HEADS.NUM_CLASSES", "5"]).MODEL.ROI_HEADS.NUM_CLASSES == 5
    (tmp_path / "c.yaml").write_text("MODEL: {ROI_HEADS: {NUM_CLASSES: 7}}\nVERSION: 2\n")
    assert load_config(str(tmp_path / "c.yaml")).MODEL.ROI_HEADS.NUM_CLASSES == 7


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL: {GN: {GROUPS: 3}}", "Non-existent config key: MODEL.GN.GROUPS"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER"),
        ("MODEL: [", "c.yaml"),
        ("just words", "c.yaml"),
        ("_BASE_: absent.yaml", "absent.yaml"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml: ") as error:
        load_config(str(path))
    assert message in str(error.value)


def test_yaml_does_not_execute_code(tmp_path):
    path = tmp_path / "c.yaml"
    canary = tmp_path / "canary"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{canary}']\nVERSION: 2\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(str(path))
    assert not canary.exists()


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.NOTHING", "1"], "command line: Non-existent key: MODEL.NOTHING"),
        (["SOLVER.MAX_ITER"], "command line: Override list has odd length"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.EPOCHS", "many"], "SOLVER.EPOCHS is 'many'; it must be a number of epochs"),
        (["SOLVER.MAX_ITER.X", "3"], "the command line: "),
    ],
)
def test_bad_options(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config("", opts)


def test_missing_file():
    with pytest.raises(ConfigError, match="absent.yaml"):
        load_config("absent.yaml")


def test_configs_are_short_deltas():
    for name in CONFIGS:
        text = (ROOT / "configs" / name).read_text()
        assert "_BASE_" in yaml.safe_load(text) and len(text.splitlines()) <= 40
