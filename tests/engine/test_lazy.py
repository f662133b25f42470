import pytest
import torch
from engine.trainers import train_lazy
from helpers import assert_equal
from omegaconf import OmegaConf

from gn_detect.engine import lazy, prepare_run
from gn_detect.engine.lazy import do_train
from gn_detect.engine.lazy_config import instantiate_key
from gn_detect.engine.trainer import build_loop
from gn_detect.evaluation.masks import PastedMasks
from gn_detect.settings import Settings

pytestmark = pytest.mark.slow


def test_training_leaves_the_config_as_it_was(lazy_data, tmp_path, monkeypatch):
    pasted, paste = [], PastedMasks.__iter__
    monkeypatch.setattr(PastedMasks, "__iter__", lambda m: pasted.append(m) or paste(m))
    cfg = lazy_data(f"train.output_dir={tmp_path}", "train.max_iter=1")
    prepare_run(cfg)
    before = OmegaConf.to_yaml(cfg)
    results = do_train(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    assert {"bbox", "segm"} == set(results)
    assert pasted  # one by one
    weights = tmp_path / "model_final.safetensors"
    weights.unlink()  # as if the disk had been full
    assert do_train(cfg, resume=True).keys() == results.keys()
    assert weights.exists()


def test_a_resumed_run_equals_the_uninterrupted_one(lazy_data, tmp_path):
    """With the order of the images, their flips, and this run's options."""

    def train(output, *options, stop=4, resume=False):
        cfg = lazy_data(
            *(f"train.output_dir={tmp_path / output}", "train.checkpointer.period=2"),
            *("train.eval_period=1", "train.max_iter=4", *options),
        )
        names = ("model_final", "model_final_ema", "model_best")
        return train_lazy(cfg, *names, stop=stop, resume=resume)

    # A constant rate, so that the first half does not depend on the length of the run.
    rate = ("lr_multiplier.scheduler.end_value=1.0", "lr_multiplier.warmup_length=0.0")
    rate += ("train.ema.enabled=True", "train.best_metric=bbox/AP")
    whole = train("whole", *rate)
    half = train("stopped", *rate, stop=2)
    assert any(not torch.equal(value, whole[key]) for key, value in half.items())
    assert_equal(train("stopped", *rate, resume=True), whole)
    assert '"ema/bbox/AP"' in (tmp_path / "whole/metrics.json").read_text()


def test_more_augmentation(lazy_data):
    cfg = lazy_data("dataloader.train.copy_paste=True", "dataloader.train.color_jitter=0.3")
    assert Settings(cfg)["copy_paste"]
    loader = instantiate_key(cfg, "dataloader.train").dataset
    assert loader.dataset.copy_paste and loader.dataset.color_jitter == 0.3
    assert loader.sampler.close == 0.15


def test_accumulation_shares_the_images_of_an_iteration(lazy_data, tmp_path, monkeypatch):
    built = []

    def build(*args, **kwargs):
        built[:] = build_loop(*args, **kwargs)
        return built

    monkeypatch.setattr(lazy, "build_loop", build)
    cfg = lazy_data(
        *(f"train.output_dir={tmp_path}", "train.max_iter=1", "train.accumulate_steps=2"),
        *("train.amp.enabled=True", "train.amp.dtype=bfloat16"),
    )
    del cfg.dataloader.evaluator
    prepare_run(cfg)
    assert do_train(cfg) == {}
    trainer, *_ = built
    assert [len(batch) for batch in trainer.batches] == [1, 1]
    assert trainer.amp_dtype == torch.bfloat16


def test_a_loss_that_is_not_finite_stops_the_run(lazy_data, tmp_path):
    cfg = lazy_data(f"train.output_dir={tmp_path}", "train.max_iter=9", "optimizer.lr=1e18")
    prepare_run(cfg)
    with pytest.raises(
        FloatingPointError, match=r"diverged at iteration .*\.png.*lower optimizer.lr"
    ):
        do_train(cfg)
