import pytest
import torch
from omegaconf import OmegaConf

from gn_detect.engine import lazy, prepare_run
from gn_detect.engine.lazy import do_train
from gn_detect.engine.train_loop import AccumulatingTrainer


def test_training_leaves_the_config_as_it_was(lazy_data, tmp_path):
    cfg = lazy_data(f"train.output_dir={tmp_path}", "train.max_iter=1")
    prepare_run(cfg)
    before = OmegaConf.to_yaml(cfg)
    results = do_train(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    assert {"bbox", "segm"} == set(results)
    weights = tmp_path / "model_final.safetensors"
    weights.unlink()  # as if the disk had been full
    assert do_train(cfg, resume=True).keys() == results.keys()
    assert weights.exists()


def test_accumulation_shares_the_images_of_an_iteration(lazy_data, tmp_path, monkeypatch):
    trainers = []

    class Recording(AccumulatingTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            trainers.append(self)

    monkeypatch.setattr(lazy, "AccumulatingTrainer", Recording)
    cfg = lazy_data(
        *(f"train.output_dir={tmp_path}", "train.max_iter=1", "train.accumulate_steps=2"),
        *("train.amp.enabled=True", "train.amp.dtype=bfloat16"),
    )
    del cfg.dataloader.evaluator
    prepare_run(cfg)
    assert do_train(cfg) == {}
    (trainer,) = trainers
    assert [len(batch) for batch in trainer.batches] == [1, 1]
    assert trainer.amp_dtype == torch.bfloat16


def test_a_loss_that_is_not_finite_stops_the_run(lazy_data, tmp_path):
    cfg = lazy_data(f"train.output_dir={tmp_path}", "train.max_iter=9", "optimizer.lr=1e18")
    prepare_run(cfg)
    with pytest.raises(
        FloatingPointError, match=r"diverged at iteration .*\.png.*lower optimizer.lr"
    ):
        do_train(cfg)
