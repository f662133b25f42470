import importlib.util
import logging

import pytest
from detectron2.solver import build_lr_scheduler
from helpers import config
from torch import nn, optim

from gn_detect.config import ConfigError
from gn_detect.engine.options import check_options


def test_pictures_of_training_need_opencv(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = config()
    check_options(cfg, training=True)
    cfg.VIS_PERIOD = 20
    with pytest.raises(ConfigError, match="VIS_PERIOD is 20, .* opencv-python-headless"):
        check_options(cfg, training=True)
    check_options(cfg, training=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_options(cfg, training=True)


def test_a_schedule_that_fails_at_its_end():
    cfg = config()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER = "WarmupStepWithFixedGammaLR", 4
    cfg.SOLVER.WARMUP_ITERS = 1
    with pytest.raises(ConfigError, match="use WarmupMultiStepLR"):
        check_options(cfg, training=True)
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    schedule = build_lr_scheduler(cfg, optimizer)
    with pytest.raises(IndexError):  # once there is none, the refusal can go
        for _ in range(cfg.SOLVER.MAX_ITER):
            optimizer.step()
            schedule.step()


def test_what_is_ignored_is_said(caplog):
    cfg = config()
    cfg.TEST.AUG.ENABLED = True
    with caplog.at_level(logging.WARNING, "gn_detect"):
        check_options(cfg, training=False)
    assert "TEST.AUG.ENABLED is ignored" in caplog.text
