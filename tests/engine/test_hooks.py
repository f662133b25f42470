"""What an evaluation may do to a training: nothing."""

import itertools
import json
from types import SimpleNamespace

import pytest
from detectron2.checkpoint import Checkpointer
from detectron2.engine import TrainerBase
from detectron2.utils.events import JSONWriter
from engine.trainers import PERIODS, train_lazy
from helpers import assert_equal, weights
from torch import nn

from gn_detect.engine import hooks, lazy, prepare_run
from gn_detect.engine.hooks import EvalHook, Saving
from gn_detect.engine.lazy import do_train


class Recorder(Checkpointer):
    """Of what is saved, and what is there after each iteration."""

    saved: list

    def save(self, name, **state):
        self.saved.append((name, state["iteration"]))
        super().save(name, **state)


class Resume:
    gathered = 0

    def gather_random_states(self):
        self.gathered += 1


class Loop(TrainerBase):
    def run_step(self):
        pass


def saving(path, monkeypatch, *arguments, **options) -> tuple[Saving, Recorder]:
    """With a clock of its own, ``hook.now``."""
    checkpointer = Recorder(nn.Linear(1, 1), str(path))
    checkpointer.saved = []
    hook = Saving(checkpointer, Resume(), *arguments, **options)
    hook.now = 100.0
    monkeypatch.setattr(hooks, "time", SimpleNamespace(monotonic=lambda: hook.now))
    return hook, checkpointer


@pytest.mark.parametrize(
    "period, eval_period, saved, left",
    [
        (
            *(4, 3),
            [("latest", 2), ("0000003", 3), ("latest", 5), ("0000007", 7)],
            ["0000003", "0000007"],
        ),
        (4, 4, [("0000003", 3), ("0000007", 7)], ["0000003", "0000007"]),
        (2, 4, [("0000001", 1), ("0000003", 3), ("0000005", 5), ("0000007", 7)], 4 * ["00000"]),
        (100, 8, [], []),  # model_final is saved before that evaluation
        (100, 0, [], []),
        (0, 0, [], []),
    ],
)
def test_when_a_run_is_saved(tmp_path, monkeypatch, period, eval_period, saved, left):
    hook, checkpointer = saving(tmp_path, monkeypatch, period, eval_period=eval_period)
    evaluated = []

    def evaluate():
        assert checkpointer.saved[-1][1] == loop.iter - (loop.iter == 8)
        assert checkpointer.has_checkpoint()
        evaluated.append(loop.iter)

    loop, checked = Loop(), []
    monkeypatch.setattr(hooks, "check_weights_same", lambda model, _: checked.append(loop.iter))
    loop.register_hooks([hook, EvalHook(eval_period, evaluate)])
    loop.train(0, 8)
    assert checked == [0, *sorted({i for n, i in saved if n != "latest"} | {7})]
    assert len(evaluated) == 1 + (7 // eval_period if eval_period else 0)
    assert checkpointer.saved == [*((f"model_{n}", i) for n, i in saved), ("model_final", 7)]
    assert hook._resume.gathered == len({i for _, i in checkpointer.saved})
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    assert len(names) == len(left) + 1
    assert all(name.startswith(f"model_{n}") for name, n in zip(names, left, strict=False))


def test_an_average_is_not_said_to_be_evaluated_on_nothing(train, tmp_path, caplog):
    trainer = train(
        tmp_path / "run",
        *("DATASETS.TEST", (), "SOLVER.EMA.ENABLED", True, "SOLVER.MAX_ITER", 1),
    )
    with caplog.at_level("INFO"):
        trainer.train()
    assert (tmp_path / "run/model_final_ema.safetensors").exists()
    assert "(EMA)" not in caplog.text


def test_every_evaluation_is_written(tmp_path):
    """Also those of an iteration at which the writers do not write."""
    path, loop = tmp_path / "metrics.json", Loop()
    evaluation = EvalHook(2, lambda: {"bbox": {"AP": float(loop.iter)}})
    writer = hooks.hooks.PeriodicWriter([JSONWriter(str(path))], period=4)
    loop.register_hooks([evaluation, writer])
    loop.train(0, 7)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["iteration"], x["bbox/AP"]) for x in lines] == [(i, i) for i in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    "seconds, saved",
    [
        # After 6 and 3 seconds; by the period it is saved at 9 s, from which the time then counts.
        (6, [("latest", 1), ("0000002", 2), ("latest", 4), ("0000005", 5), ("final", 6)]),
        (7, [("0000002", 2), ("0000005", 5), ("final", 6)]),
        (0, [("0000002", 2), ("0000005", 5), ("final", 6)]),
    ],
)
def test_saving_by_time(tmp_path, monkeypatch, seconds, saved):
    hook, checkpointer = saving(tmp_path, monkeypatch, 3, seconds=seconds)

    class Steps(Loop):
        def run_step(self):
            hook.now += 3

    loop = Steps()
    loop.register_hooks([hook])
    loop.train(0, 7)
    assert checkpointer.saved == [(f"model_{n}", i) for n, i in saved]
    assert not (tmp_path / "model_latest.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds, saves", [(2, 2), (0, 0)])
def test_both_tools_save_by_time(train, lazy_data, tmp_path, monkeypatch, caplog, seconds, saves):
    """Of a clock that goes on by a second where it is read, twice in an iteration that saves."""
    clock = itertools.count(1)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    cfg = lazy_data(
        *(f"train.output_dir={tmp_path / 'lazy'}", "train.max_iter=5"),
        f"train.checkpointer.seconds={seconds}",
    )
    del cfg.dataloader.evaluator
    prepare_run(cfg)
    options = ("SOLVER.CHECKPOINT_SECONDS", seconds, "DATASETS.TEST", (), "SOLVER.MAX_ITER", 5)
    for run in (train("run", *options).train, lambda: do_train(cfg)):
        caplog.clear()
        with caplog.at_level("INFO"):
            run()
        assert caplog.text.count("model_latest.pth") == saves


@pytest.mark.parametrize(
    "start, evaluated", [(0, [3, 6, 8]), (3, [3, 6, 8]), (4, [6, 8]), (6, [6, 8]), (8, [9])]
)
def test_a_resumed_run_begins_with_the_evaluation_of_its_checkpoint(start, evaluated):
    found, done, loop = [], [], Loop()

    def evaluate():
        done.append(len(steps))
        found.append(loop.storage.iter + (loop.storage.iter < 8))
        return {"AP": 1.0}

    steps = []
    loop.run_step = lambda: steps.append(loop.iter)
    loop.register_hooks([EvalHook(3, evaluate)])
    loop.train(start, 8)
    assert found == evaluated
    assert done == [min(i, 8) - start for i in evaluated]


@pytest.mark.parametrize("start", [0, 6, 7, 8])
def test_a_run_that_fails_is_not_evaluated(start):
    class Failing(Loop):
        def before_train(self):
            if start != 6:
                raise Accident

        def run_step(self):
            if self.iter == 7:
                raise Accident

    loop = Failing()
    loop.register_hooks([EvalHook(0, lambda: pytest.fail("evaluated"))])
    with pytest.raises(Accident):
        loop.train(start, 8)


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
    assert (run / "last_checkpoint").read_text() == "model_latest.pth"
    resumed = train("stopped", *options, "SEED", 99, resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    assert_equal(weights(resumed), weights(whole))
    names = {path.name for path in (tmp_path / "whole").glob("*.pth")}
    periodic = {"model_0000002.pth", "model_0000005.pth"}
    assert names == {*periodic, "model_final.pth", "model_best.pth"}
    assert names == {path.name for path in run.glob("*.pth")}


def raise_accident(*args):
    raise Accident


@pytest.mark.slow
def test_a_lazy_run_goes_on_from_before_the_evaluation(lazy_data, tmp_path, monkeypatch):
    def run(output, resume=False):
        cfg = lazy_data(f"train.output_dir={tmp_path / output}", *PERIODS)
        return train_lazy(cfg, "model_final", resume=resume)

    whole = run("whole")
    with monkeypatch.context() as context:
        context.setattr(lazy, "inference_on_dataset", raise_accident)
        with pytest.raises(Accident):
            run("stopped")
    last = (tmp_path / "stopped" / "last_checkpoint").read_text()
    assert last == "model_latest.pth"
    assert_equal(run("stopped", resume=True), whole)


@pytest.mark.slow
def test_nothing_to_evaluate(train, caplog):
    with caplog.at_level("INFO"):
        train("run", "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 4).train()
    assert caplog.text.count("Saving checkpoint") == 1  # the final one
