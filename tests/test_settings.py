"""The door through which all goes that a run derives: what was typed stays, or is refused."""

import pytest
from helpers import config
from omegaconf import OmegaConf

from gn_detect.config import ConfigError
from gn_detect.settings import Settings

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"


def test_what_is_not_typed_is_derived():
    run = Settings(config(), ["SOLVER.MAX_ITER", "SOLVER.AMP"])
    assert run.derive("base_lr", 0.5, "a reason") and run["base_lr"] == 0.5
    assert run.is_typed("max_iter") and not run.is_typed("base_lr")
    assert run.is_typed("amp")  # its section was
    assert not run.is_typed("nothing")


def test_what_is_typed_stays(caplog):
    caplog.set_level("INFO", "gn_detect")
    run = Settings(config(R50, "SOLVER.STEPS", [3, 5]), ["SOLVER.STEPS"])
    assert not run.derive("steps", (3, 5), "a reason") and not caplog.messages
    assert not run.derive("steps", (1,), "a reason") and run["steps"] == (3, 5)
    assert caplog.messages == ["SOLVER.STEPS stays (3, 5), as typed, and not (1,) (a reason)"]
    with pytest.raises(ConfigError, match=r"STEPS is \(3, 5\) on the .*, but a reason; .* \(1,\)"):
        run.derive("steps", (1,), "a reason", needed=True)


@pytest.mark.parametrize(
    "typed, is_typed",
    [
        ("dataloader.train.mapper.x", True),
        ("dataloader.train.mapper", True),
        ("dataloader.train.mapper.x[0]", True),
        ("dataloader.train.mapper.x.0", True),
        ("dataloader.train.mapper.xy", False),
    ],
)
def test_parts_and_sections(typed, is_typed):
    run = Settings(OmegaConf.create({"train": {"guards": {}}, "model": {}}), [typed])
    run.keys["amp"] = "dataloader.train.mapper.x"
    assert run.is_typed("amp") == is_typed
