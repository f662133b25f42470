"""What an evaluation may do to a training: nothing."""

import pytest
from detectron2.checkpoint import Checkpointer
from detectron2.utils.env import seed_all_rng
from helpers import assert_equal, weights
from safetensors.torch import load_file
from torch import nn

from gn_detect.engine import lazy, prepare_run
from gn_detect.engine.hooks import PeriodicCheckpointer
from gn_detect.engine.lazy import do_train


class Recorder(Checkpointer):
    """Of what is saved, and what is there after each iteration."""

    saved: list

    def save(self, name, **state):
        self.saved.append((name, state["iteration"]))
        super().save(name, **state)


@pytest.mark.parametrize(
    "period, eval_period, saved, left",
    [
        (
            *(4, 3),
            [("before_evaluation", 2), ("0000003", 3), ("before_evaluation", 5), ("0000007", 7)],
            ["0000003", "0000007"],
        ),
        (4, 4, [("0000003", 3), ("0000007", 7)], ["0000003", "0000007"]),
        (2, 4, [("0000001", 1), ("0000003", 3), ("0000005", 5), ("0000007", 7)], 4 * ["00000"]),
        (100, 8, [], []),  # model_final is saved before that evaluation
        (100, 0, [], []),
    ],
)
def test_when_a_run_is_saved(tmp_path, period, eval_period, saved, left):
    checkpointer = Recorder(nn.Linear(1, 1), str(tmp_path))
    checkpointer.saved = []
    hook = PeriodicCheckpointer(checkpointer, period, eval_period)
    hook.max_iter = 8
    for iteration in range(8):
        hook.step(iteration)
        if eval_period and (iteration + 1) % eval_period == 0:
            assert checkpointer.saved[-1][1] == iteration
            assert checkpointer.has_checkpoint()
    assert checkpointer.saved == [*((f"model_{n}", i) for n, i in saved), ("model_final", 7)]
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    assert len(names) == len(left) + 1
    assert all(name.startswith(f"model_{n}") for name, n in zip(names, left, strict=False))


class Accident(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_from_before_the_evaluation_that_ended_it(train, tmp_path, monkeypatch):
    options = ("TEST.EVAL_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 3)
    whole = train("whole", *options)
    whole.train()
    stopped = train("stopped", *options)
    with monkeypatch.context() as context:
        context.setattr("detectron2.engine.defaults.inference_on_dataset", raise_accident)
        with pytest.raises(Accident):
            stopped.train()
    run = tmp_path / "stopped"
    assert (run / "last_checkpoint").read_text() == "model_before_evaluation.pth"
    resumed = train("stopped", *options, "SEED", 99, resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    assert_equal(weights(resumed), weights(whole))
    names = {path.name for path in (tmp_path / "whole").glob("*.pth")}
    assert names == {"model_0000002.pth", "model_0000005.pth", "model_final.pth"}
    assert names == {path.name for path in run.glob("*.pth")}


def raise_accident(*args):
    raise Accident


@pytest.mark.slow
def test_a_lazy_run_goes_on_from_before_the_evaluation(lazy_data, tmp_path, monkeypatch):
    def run(output, resume=False):
        cfg = lazy_data(
            *(f"train.output_dir={tmp_path / output}", "train.checkpointer.period=3"),
            *("train.eval_period=2", "train.max_iter=4"),
        )
        prepare_run(cfg, resume=resume)
        seed_all_rng(99 if resume else 3)
        do_train(cfg, resume=resume)
        return load_file(tmp_path / output / "model_final.safetensors")

    whole = run("whole")
    with monkeypatch.context() as context:
        context.setattr(lazy, "inference_on_dataset", raise_accident)
        with pytest.raises(Accident):
            run("stopped")
    last = (tmp_path / "stopped" / "last_checkpoint").read_text()
    assert last == "model_before_evaluation.pth"
    assert_equal(run("stopped", resume=True), whole)


@pytest.mark.slow
def test_nothing_to_evaluate(train, caplog):
    with caplog.at_level("INFO"):
        train("run", "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 4).train()
    assert caplog.text.count("Saving checkpoint") == 1  # the final one
