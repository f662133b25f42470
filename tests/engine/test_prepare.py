import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import SQUARE_RLE, TINY, refusal

from gn_detect import get_config_file
from gn_detect.checkpoint import CheckpointError
from gn_detect.config import ConfigError, load_config
from gn_detect.data.coco import DataError, register_coco_json
from gn_detect.engine import prepare_run, sentence
from gn_detect.engine.best import Best, best_of
from gn_detect.settings import Settings


@pytest.fixture
def own_data(coco_files):
    """Options of a run on ``coco_files``."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    output = str(coco_files.json_file.parent / "output")
    return ["DATASETS.TRAIN", ("own",), "DATASETS.TEST", ("own",), "OUTPUT_DIR", output]


def prepare(opts, **kwargs):
    cfg = load_config(get_config_file("quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"), opts)
    prepare_run(cfg, **kwargs)
    return cfg


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@no_cuda
def test_without_cuda_the_cpu_is_used_and_said(own_data, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        cfg = prepare([*own_data, "SOLVER.AMP.ENABLED", True])
    assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
    assert "no CUDA device is available: MODEL.DEVICE = cpu" in caplog.text
    assert "SOLVER.AMP.ENABLED = False" in caplog.text


@no_cuda
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.DEVICE", "cuda", "MODEL.DEVICE is 'cuda' on the command line, but no CUDA device"),
        ("SOLVER.AMP.ENABLED", True, "ENABLED is True .*float16 needs CUDA .*bfloat16 does not"),
    ],
)
def test_what_needs_cuda_is_refused_where_it_is_typed(own_data, key, value, message):
    with pytest.raises(ConfigError, match=message):
        prepare([*own_data, key, value], typed=[key])


def test_an_epoch_is_of_the_images_that_are_trained_on(own_data, coco_files):
    coco_files.content["annotations"].pop()
    coco_files.write()
    epochs = ["SOLVER.EPOCHS", 5, "SOLVER.IMS_PER_GPU", 1]
    assert prepare([*own_data, *epochs]).SOLVER.MAX_ITER == 5 * 2
    every = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]
    assert prepare([*own_data, *epochs, *every]).SOLVER.MAX_ITER == 5 * 3
    DatasetCatalog.register("function", lambda: [])
    MetadataCatalog.get("function").set(evaluator_type="coco", thing_classes=["dog", "cat"])
    try:
        with pytest.raises(ConfigError, match="EPOCHS is 5, but how many images .* is not known"):
            prepare([*own_data, *epochs, "DATASETS.TRAIN", ("own", "function")])
    finally:
        DatasetCatalog.remove("function")
        MetadataCatalog.remove("function")


@no_cuda
def test_bfloat16_needs_no_cuda(own_data, caplog):
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    assert prepare([*own_data, *amp]).SOLVER.AMP.ENABLED
    assert "AMP" not in caplog.text


def test_classes_follow_the_data(own_data, caplog):
    with caplog.at_level(logging.INFO, "gn_detect"):
        assert prepare([*own_data, *TINY]).MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert "NUM_CLASSES = 2, from the dataset own: dog, cat" in caplog.text
    assert prepare([*own_data, "MODEL.ROI_HEADS.NUM_CLASSES", 2]).MODEL.ROI_HEADS.NUM_CLASSES == 2
    with pytest.raises(ConfigError, match="NUM_CLASSES is 80, but the dataset own declares 2"):
        prepare([*own_data, *TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 80])


def test_classes_of_a_retinanet_follow_the_data(own_data):
    cfg = load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml"), own_data)
    cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = "", 0
    prepare_run(cfg)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2 and cfg.MODEL.ROI_HEADS.NUM_CLASSES is None
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    with pytest.raises(ConfigError, match="RETINANET.NUM_CLASSES is 80, but .* declares 2"):
        prepare_run(cfg)


def test_the_panoptic_evaluation_is_asked_for_before_the_run(own_data, monkeypatch):
    monkeypatch.setitem(vars(MetadataCatalog.get("own")), "evaluator_type", "coco_panoptic_seg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the evaluation of own \(coco_panoptic_seg\) needs pan"):
        prepare(own_data)
    prepare([*own_data, "DATASETS.TEST", ()])


def test_datasets_of_different_categories(own_data, coco_files):
    coco_files.content["categories"][0]["name"] = "tiger"
    other = coco_files.json_file.with_name("other.json")
    other.write_text(json.dumps(coco_files.content))
    register_coco_json("other", str(other), str(coco_files.image_root))
    with pytest.raises(DataError, match=r"own and other declare different categories \(ids 7\)"):
        prepare([*own_data, *TINY, "DATASETS.TEST", ("other",)])


def test_what_is_trained_on_is_described_once(own_data, coco_files, caplog):
    with caplog.at_level(logging.INFO, "gn_detect"):
        prepare([*own_data, *TINY, "INPUT.MIN_SIZE_TRAIN", (128,)])
    (text,) = [m for m in caplog.messages if m.startswith("data of own: ")]
    assert "3 images, 0 (0 %) of them without objects; 3 objects of 2 classes" in text
    assert "shorter side 128, longer at most 96" in text and "best IoU" in text
    assert len(text.splitlines()) < 30
    caplog.clear()
    with caplog.at_level(logging.INFO, "gn_detect"):
        prepare([*own_data, *TINY, "MODEL.WEIGHTS", __file__], eval_only=True)
    assert "data of own" not in caplog.text


def test_a_dataset_without_a_json(own_data):
    DatasetCatalog.register("dicts", lambda: [])
    MetadataCatalog.get("dicts").set(evaluator_type="coco", thing_classes=["dog", "cat"])
    prepare([*own_data, *TINY, "DATASETS.TEST", ("dicts",)])
    DatasetCatalog.remove("dicts")
    MetadataCatalog.remove("dicts")


def test_what_is_both_trained_and_evaluated_on_is_said(own_data, coco_files, tmp_path, caplog):
    register_coco_json("other", str(coco_files.json_file), str(coco_files.image_root))
    prepare([*own_data, "DATASETS.TEST", ("other",)])
    assert caplog.text.count("is both trained and evaluated on") == 1
    caplog.clear()
    (tmp_path / "weights.pth").touch()
    weights = ("MODEL.WEIGHTS", str(tmp_path / "weights.pth"))
    prepare([*own_data, *weights], eval_only=True)
    assert "trained and evaluated" not in caplog.text


def test_mask_format_follows_the_data(own_data, coco_files):
    assert prepare([*own_data, *TINY]).INPUT.MASK_FORMAT == "polygon"
    coco_files.content["annotations"][0]["segmentation"] = SQUARE_RLE
    coco_files.write()
    assert prepare([*own_data, *TINY]).INPUT.MASK_FORMAT == "bitmask"


def test_masks_are_not_asked_for_where_none_are_trained(own_data, coco_files):
    del coco_files.content["annotations"][0]["segmentation"]
    coco_files.write()
    with pytest.raises(DataError, match="has no segmentation"):
        prepare([*own_data, "MODEL.MASK_ON", True])
    assert not prepare([*own_data, "MODEL.MASK_ON", False]).MODEL.MASK_ON


@pytest.mark.parametrize(
    "opts, kwargs, message",
    [
        (["MODEL.WEIGHTS", "absent.pth"], {}, "MODEL.WEIGHTS: there is no file absent.pth"),
        (["MODEL.WEIGHTS", ""], {"eval_only": True}, "MODEL.WEIGHTS is empty.*--eval-only"),
        (
            ["DATASETS.TEST", (), "MODEL.WEIGHTS", __file__],
            {"eval_only": True},
            "DATASETS.TEST is empty: with --eval-only",
        ),
        (["DATASETS.TRAIN", ()], {}, "DATASETS.TRAIN is empty"),
        (["DATASETS.TRAIN", ("nothing",)], {}, "'nothing', which is not registered"),
        (
            ["SOLVER.IMS_PER_BATCH", 3],
            {"processes": 2},
            "IMS_PER_BATCH is 3.*multiple of 2: the processes",
        ),
        (["SOLVER.IMS_PER_BATCH", 0], {}, "IMS_PER_BATCH is 0"),
        (["SOLVER.CHECKPOINT_KEEP", -1], {}, "CHECKPOINT_KEEP is -1; .* or 0 for all"),
        (["SOLVER.CHECKPOINT_SECONDS", -1], {}, "CHECKPOINT_SECONDS is -1; .* or 0 to save by"),
        (["SOLVER.EARLY_STOP", -1], {}, "EARLY_STOP is -1; it must be the evaluations"),
        (["SOLVER.EARLY_STOP_MIN_DELTA", -0.1], {}, "EARLY_STOP_MIN_DELTA is -0.1; it must be the"),
        (
            ["SOLVER.EARLY_STOP", 3, "TEST.EVAL_PERIOD", 0],
            {},
            "EARLY_STOP is 3, .*, but TEST.EVAL_PERIOD is 0; set .*, or SOLVER.EARLY_STOP 0",
        ),
        (
            ["SOLVER.EARLY_STOP", 3, "DATASETS.TEST", ()],
            {},
            r"EARLY_STOP is 3, .* nothing to evaluate on; name data \(DATASETS.TEST\), or",
        ),
        (["SOLVER.EMA.DECAY", 1.0], {}, r"EMA.DECAY is 1.0; it must be in \[0, 1\)"),
        (
            ["TEST.BEST_METRIC", "segm/mAP"],
            {},
            "BEST_METRIC is 'segm/mAP', .* bbox/AP, .* segm/APl; of a class: bbox/AP-dog",
        ),
        (["TEST.BEST_METRIC", "keypoints/AP"], {}, "'keypoints/AP', which .* does not measure"),
        (["SOLVER.AMP.DTYPE", "bf16"], {}, "AMP.DTYPE is 'bf16'; known: float16, bfloat16"),
        (["DATASETS.TEST", ("voc_2007_val",)], {}, "needs .*VOC2007, which does not exist"),
        (
            ["DATASETS.TEST", ("cityscapes_fine_panoptic_val",)],
            {},
            "cityscapes_fine_panoptic_val has the evaluator_type 'cityscapes_panoptic_seg'",
        ),
        (["TEST.COCO_EVAL", "fastest"], {}, "COCO_EVAL is 'fastest'; known: auto, fast, pyc"),
        (
            ["DATASETS.TRAIN", ("coco_2017_train",), "DATASETS.TEST", ()],
            {},
            "coco_2017_train: there is no .*DETECTRON2_DATASETS",
        ),
    ],
)
def test_what_cannot_run_is_refused(own_data, opts, kwargs, message):
    with pytest.raises((ConfigError, DataError), match=message):
        prepare([*own_data, *opts], **kwargs)


@pytest.mark.parametrize("metric", ["auto", "bbox/AP50", "segm/AP-cat"])
def test_the_metric_of_the_best_evaluation(own_data, metric):
    stop = ("SOLVER.EARLY_STOP", 2, "TEST.EVAL_PERIOD", 5)
    run = Settings(prepare([*own_data, "TEST.BEST_METRIC", metric, *stop]))
    assert best_of(run) == Best("segm/AP" if metric == "auto" else metric, 2)
    run["masks"] = False
    assert best_of(run).metric == ("bbox/AP" if metric == "auto" else metric)
    run["keypoints"] = True
    assert best_of(run).metric == ("keypoints/AP" if metric == "auto" else metric)


def test_resume_from_a_checkpoint_that_is_gone(own_data, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(CheckpointError, match="'model_0000009.pth' .named by last_check"):
        prepare([*own_data, "OUTPUT_DIR", str(tmp_path)], resume=True)


def test_sentences_of_expected_errors_alone():
    assert sentence(DataError("bad.json: fix it")) == "bad.json: fix it"
    worker = DataError("Caught DataError in worker.\nTraceback\na.b.DataError: cannot use 2.png")
    assert sentence(worker) == "cannot use 2.png"
    process = Exception("-- Process 1\nTraceback\nFloatingPointError: training diverged")
    assert sentence(process) == "training diverged"
    assert sentence(ConfigError("a.yaml: found\n  in line 2")) == "a.yaml: found in line 2"
    assert sentence(ValueError("a bug")) is None
    assert sentence(ValueError("Traceback\nValueError: not DataError: a bug")) is None
    assert sentence(KeyError()) is None


def test_the_sentence_of_a_full_disk_is_that_of_the_checkpoint():
    with pytest.raises(OSError, match="No space") as error:
        try:
            raise CheckpointError("model_final.pth could not be written")
        finally:
            raise OSError(28, "No space left on device")
    assert sentence(error.value) == "model_final.pth could not be written"


def test_resume_without_a_checkpoint_is_said(own_data, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        prepare(own_data, resume=True)
    assert "--resume: no checkpoint in" in caplog.text


@pytest.mark.parametrize("name", ["metrics.json", "last_checkpoint"])
def test_the_output_of_an_earlier_run_is_not_overwritten(own_data, tmp_path, name):
    output = tmp_path / "output"
    opts = [*own_data, *TINY, "OUTPUT_DIR", str(output)]
    prepare(opts)
    output.mkdir(exist_ok=True)
    (output / name).touch()
    prepare(opts)  # nothing was written yet
    (output / name).write_text("model_final.pth")
    with pytest.raises(ConfigError, match=f"OUTPUT_DIR holds a run already .*{name}.*--resume"):
        prepare(opts)
    prepare([*opts, "GUARDS.OVERWRITE_OUTPUT", False])
    torch.save({"iteration": 7}, output / "model_final.pth")
    prepare(opts, resume=True)
    prepare([*opts, "MODEL.WEIGHTS", str(output / "model_final.pth")], eval_only=True)


def test_an_output_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "run")
    for tool, name, *options in (
        ("train_net.py", "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", "OUTPUT_DIR", output),
        (
            *("lazyconfig_train_net.py", "lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py"),
            f"train.output_dir={output}",
        ),
    ):
        message = refusal(tool, "--config-file", get_config_file(name), *options)
        assert f"is {output}, where nothing can be written (Not a directory)" in message
