"""The best evaluation of a run, its end where there is no gain, and the average of its weights: of
a training of one layer that takes milliseconds, so that it can be killed anywhere."""

import copy
import json
import logging
import math
import os
import re
from pathlib import Path

import pytest
import safetensors
import torch
from detectron2.engine import HookBase
from engine.pair import two_machines
from helpers import assert_equal, config, differences
from torch import nn

from gn_detect.checkpoint import Checkpointer, WeightGuards, newest_checkpoint
from gn_detect.engine.best import Best
from gn_detect.engine.ema import EMA, evaluate_both
from gn_detect.engine.hooks import EvalHook, Saving
from gn_detect.engine.resume import Resume
from gn_detect.engine.train_loop import AccumulatingTrainer
from gn_detect.settings import Settings

NAN = math.nan
CFG = config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", "SOLVER.MAX_ITER", 10)
KEYS = {"early_stop": "SOLVER.EARLY_STOP", "best_metric": "TEST.BEST_METRIC"}


@pytest.mark.parametrize(
    "values, early_stop, min_delta, best, stops",
    [
        ([1, 3, 2, 3, 2.5], 0, 0, 2, None),  # of equal ones the first
        ([1, 3, 2, 3, 2.5], 3, 0, 2, 5),
        ([NAN, NAN, NAN, 0, 0, 0], 2, 0, 4, 6),  # nothing counts before the first
        ([1, NAN, NAN], 2, 0, 1, 3),
        ([NAN, math.inf], 1, 0, 0, None),
        # Gains that are too small are the best all the same, and count where they have added up.
        ([1, 1.4, 1.8, 2.2, 2.3, 2.4, 2.5], 3, 1, 7, 7),
        ([1, 2, 3], 1, 1, 3, 2),
        ([5, 4, 3, 6, 5, 4], 3, 0, 4, None),
    ],
)
def test_the_best_of_a_sequence(values, early_stop, min_delta, best, stops):
    run, stopped = Best("bbox/AP", early_stop, min_delta), None
    for i, value in enumerate(values, 1):
        expected = all(value > v for v in values[: i - 1] if not math.isnan(v))
        assert run.take(i, {"bbox/AP": value}) == (expected and math.isfinite(value))
        stopped = stopped or (i if run.stops else None)
    assert (run.best_done, stopped) == (best, stops)
    assert run.value == (values[best - 1] if best else -math.inf)


def test_which_metric_counts():
    sets = Best("bbox/AP")
    sets.take(2, {"a/bbox/AP": 1.0, "b/bbox/AP": 2.0, "b/bbox/AP50": 9.0, "a/segm/AP": 7.0})
    assert sets.value == 1.5
    sets.take(4, {"a/bbox/AP": 9.0, "b/bbox/AP": NAN})
    assert (sets.value, sets.unknown()) == (1.5, "")
    sets.take(6, {"a/segm/AP": 9.0, "a/segm/AP-cat": 9.0})
    assert sets.unknown() == "a/segm/AP"
    one = Best("b/bbox/AP")
    assert one.take(2, {"a/bbox/AP": 1.0, "b/bbox/AP": 2.0}) and one.value == 2
    assert not one.take(0, {"b/bbox/AP": 8.0})  # at iteration 0


def test_the_better_of_the_weights_and_their_average():
    best = Best("bbox/AP")
    best.take(2, {"bbox/AP": 1.0, "ema/bbox/AP": 1.0})
    assert not best.ema
    best.take(4, {"bbox/AP": 1.0, "ema/bbox/AP": 2.0})
    assert (best.value, best.ema) == (2.0, True)
    best.take(6, {"bbox/AP": NAN, "ema/bbox/AP": 3.0})
    assert (best.value, best.ema) == (3.0, True)
    best.take(8, {"bbox/AP": 4.0, "ema/bbox/AP": 3.5})
    assert (best.value, best.ema) == (4.0, False)


def test_another_metric_begins_anew(caplog):
    state = Best("bbox/AP")
    state.take(2, {"bbox/AP": 9.0})
    best = Best("segm/AP")
    with caplog.at_level(logging.WARNING, "gn_detect"):
        best.load_state_dict(state.state_dict())
    assert best == Best("segm/AP") and "by bbox/AP; by segm/AP" in caplog.text


class Accident(Exception):
    pass


class Killed(Checkpointer):
    """Whose process dies instead of writing its last file."""

    writes = math.inf

    def _write(self, basename, write):
        self.writes -= 1
        if self.writes < 0:
            raise Accident
        super()._write(basename, write)


class Layer(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.norm = nn.Linear(3, 4), nn.GroupNorm(2, 4)

    def forward(self, batch):
        return self.norm(self.fc(batch)).mean()


# AP after 2, 4, ... iterations, of the weights and of their average.
WEIGHTS, AVERAGE = [NAN, 3, 5, 4, 4.5], [1, 4, 5, 4, 4.8]


def train(
    directory: Path,
    weights=WEIGHTS,
    average=AVERAGE,
    *,
    writes=math.inf,
    metric="bbox/AP",
    early_stop=0,
    first=True,
) -> tuple[AccumulatingTrainer, list]:
    """Go on with the run in ``directory``; return its trainer, and copies of the weights and their
    average as they were evaluated, by iterations done."""
    directory.mkdir(exist_ok=True)
    # Where there is a checkpoint, what it holds counts.
    model, evaluated = Layer(any(directory.glob("*.pth"))), []
    ema = EMA(model, 0.7)
    group = {"params": model.parameters(), "initial_lr": 0.1}  # as of a scheduler
    optimizer = torch.optim.SGD([group], lr=0.1, momentum=0.9)
    trainer = AccumulatingTrainer(model, [torch.arange(6.0).view(2, 3)] * 10, optimizer)
    guards = WeightGuards.from_config(CFG)
    options = {"names": {"classes": ["cat"]}, "config": "A: 1\n", "averaged": ema.model}
    checkpointer = Killed(model, str(directory), guards=guards, trainer=trainer, **options)
    checkpointer.writes = writes

    def evaluate(network):
        done = min(trainer.storage.iter + 1, trainer.max_iter)
        evaluated.append((done, copy.deepcopy(network.state_dict())))
        value = (average if network is ema.model else weights)[done // 2 - 1]
        return {"bbox": {"AP": float(value)}} if first else {}

    resume = Resume(Settings(CFG), trainer, checkpointer)
    saving = Saving(checkpointer, resume, 4, eval_period=2)
    best = Best(metric, early_stop)
    judge = EvalHook(2, lambda: evaluate_both(evaluate, model, ema), best, saving, KEYS)
    trainer.register_hooks([ema, resume, saving, judge])
    checkpointer.resume_or_load("", resume=True)
    resumes = checkpointer.has_checkpoint()
    trainer.train(resume.start(trainer.iter + 1) if resumes else 0, 10)
    return trainer, evaluated


def state(directory: Path, name: str = "model_final.pth") -> dict:
    return torch.load(directory / name)


def test_what_a_run_leaves(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "gn_detect"):
        _, evaluated = train(tmp_path)
    best = "the best evaluation: bbox/AP 5.000 of the weights after iteration 6; model_best has it"
    assert [best in r.getMessage() for r in caplog.records].count(True) == 1
    assert [done for done, _ in evaluated] == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    periodic = {"model_0000003.pth", "model_0000007.pth"}
    final = {"model_final.pth", "model_final.safetensors", "model_final_ema.safetensors"}
    names = {"model_best.pth", "model_best.safetensors", "last_checkpoint", *periodic, *final}
    assert {path.name for path in tmp_path.iterdir()} == names

    assert state(tmp_path, "model_0000003.pth")["metrics"] == {"bbox/AP": 3, "ema/bbox/AP": 4}
    assert state(tmp_path)["metrics"] == {"bbox/AP": 4.5, "ema/bbox/AP": 4.8}
    found = state(tmp_path, "model_best.pth")
    assert "trainer" not in found
    assert (found["iteration"], found["metrics"]) == (5, {"bbox/AP": 5})
    assert (found["config"], found["classes"]) == ("A: 1\n", ["cat"]) and found["origin"]
    weights = dict(evaluated[0::2]), dict(evaluated[1::2])  # the average is evaluated first
    assert_equal(found["model"], weights[1][6])
    for name, done, ema, metrics in (
        ("model_best", 6, False, {"bbox/AP": 5}),
        ("model_final", 10, False, {"bbox/AP": 4.5}),
        ("model_final_ema", 10, True, {"bbox/AP": 4.8}),
    ):
        path = tmp_path / f"{name}.safetensors"
        assert_equal(safetensors.torch.load_file(path), weights[not ema][done])
        with safetensors.safe_open(path, "pt") as file:
            metadata = {
                key: file.metadata()[f"gn_detect.{key}"] for key in ("iteration", "metrics")
            }
            assert file.metadata()["gn_detect.config"] == "A: 1\n"
        assert json.loads(metadata["iteration"]) == done - 1
        assert json.loads(metadata["metrics"]) == metrics

    for text in ("model_final.pth", ""):  # the best is not the last
        (tmp_path / "last_checkpoint").write_text(text)
        assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "model_final.pth")


def test_an_average_is_the_best(tmp_path):
    _, evaluated = train(tmp_path, average=[1, 4, 5, 6, 4])
    best = state(tmp_path, "model_best.pth")
    assert (best["iteration"], best["metrics"]) == (7, {"bbox/AP": 6})
    assert_equal(best["model"], dict(evaluated[0::2])[8])


def test_metrics_that_are_nan_are_left_out(tmp_path, caplog):
    train(tmp_path, weights=[NAN] * 5, average=[NAN] * 5)
    assert caplog.text.count("bbox/AP was nan in each evaluation: there is no model_best") == 1
    assert not (tmp_path / "model_best.pth").exists()
    assert state(tmp_path)["metrics"] == {}


def test_a_metric_that_nothing_measures_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        train(tmp_path, metric="segm/AP")
    text = "TEST.BEST_METRIC: segm/AP is not measured, so that no evaluation is the best; there are"
    assert caplog.text.count(f"{text} bbox/AP, ema/bbox/AP") == 1
    assert "no model_best" not in caplog.text


@pytest.mark.parametrize("early_stop, end", [(0, 10), (1, 8)])
def test_killed_at_any_write_and_resumed(tmp_path, monkeypatch, early_stop, end):
    """All that a run leaves, bit for bit: model and momentum, average, best, and metrics."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # half of the time
    _, evaluated = train(tmp_path / "whole", early_stop=early_stop)
    assert evaluated[-1][0] == end
    expected = contents(tmp_path / "whole")
    for writes in range(100):
        run = tmp_path / str(writes)
        try:
            train(run, early_stop=early_stop, writes=writes)
            break
        except Accident:
            _, again = train(run, early_stop=early_stop)
        assert differences(contents(run), expected) == [], writes
        if again:
            later = [done for done, _ in evaluated if done >= again[0][0]]
            assert [done for done, _ in again] == later
    assert writes > 20


def test_going_back_behind_the_best(tmp_path, caplog):
    train(tmp_path)
    before = contents(tmp_path)
    for name in ("model_final.pth", "model_0000007.pth", "last_checkpoint"):
        (tmp_path / name).unlink()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        train(tmp_path)
    text = "model_best.pth is of iteration 6, but .* is, so far, that of iteration 4"
    assert len(re.findall(text, caplog.text)) == 1
    assert differences(contents(tmp_path), before) == []


def contents(directory: Path) -> dict:
    found = {path.name: torch.load(path) for path in directory.glob("*.pth")}
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            found[path.name] = {"metadata": file.metadata(), **safetensors.torch.load_file(path)}
    return found


def test_the_end_of_a_run_without_gain(tmp_path, caplog):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole)
    with caplog.at_level(logging.INFO, "gn_detect"):
        trainer, evaluated = train(stopped, early_stop=1)
    assert [done for done, _ in evaluated][-1] == 8  # and not once more
    assert trainer.iter == trainer.max_iter == 8  # finished, as far as others can tell
    assert state(stopped)["iteration"] == 7
    assert (stopped / "last_checkpoint").read_text() == "model_final.pth"
    text = "ends early, after iteration 8 of 10: the last 1 evaluations brought no gain ("
    assert caplog.text.count(f"{text}SOLVER.EARLY_STOP is 1; with a greater one --resume") == 1
    assert caplog.text.count("the best evaluation: bbox/AP 5.000") == 1
    before = contents(stopped)

    caplog.clear()
    with caplog.at_level(logging.INFO, "gn_detect"):
        trainer, evaluated = train(stopped, early_stop=1)
    assert evaluated == [] and trainer.iter == 8
    assert differences(contents(stopped), before) == []
    assert text in caplog.text

    _, evaluated = train(stopped)  # which goes on
    assert [done for done, _ in evaluated] == [10, 10]
    assert differences(state(stopped), state(whole)) == []


def _in_both(rank: int, directory: Path):
    trainer, _ = train(directory, early_stop=1, first=rank == 0)
    hooks = trainer.state_dict()["hooks"]
    return trainer.iter, trainer.max_iter, hooks["EvalHook"]


def test_processes_end_together(tmp_path):
    """Though the first alone has the metrics."""
    with two_machines(tmp_path) as run:
        first, second = run(_in_both, tmp_path / "run")
    assert first[:2] == (8, 8) and first[2]["best_done"] == 6
    assert second == first


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm1d(4)])
def test_the_average_is_that_of_its_definition(norm, decay):
    model, seen = Layer(0), []
    model.norm = copy.deepcopy(norm)
    ema = EMA(model, decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(model, [torch.randn(2, 3) for _ in range(60)], optimizer, 2)

    class Remember(HookBase):
        def after_step(self):
            seen.append({k: v.double() for k, v in model.state_dict().items()})

    trainer.register_hooks([ema, Remember()])
    trainer.train(0, 30)
    assert len(seen) == 30  # of 60 batches
    expected = seen[0]
    for t, weights in enumerate(seen[1:], 1):
        d = min(decay, (1 + t) / (10 + t))
        expected = {k: d * expected[k] + (1 - d) * v for k, v in weights.items()}
    assert any((expected[k] - v).abs().max() > 1e-3 for k, v in seen[-1].items())
    for name, value in ema.model.state_dict().items():
        if value.is_floating_point():  # not the count of the batches
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_that_begins_in_the_middle(tmp_path, caplog):
    """It is the weights until the first step, as an evaluation before that sees."""
    model = Layer(0)
    ema, trainer = (
        EMA(model, 0.9),
        AccumulatingTrainer(model, [], torch.optim.SGD(model.parameters())),
    )
    model.load_state_dict(Layer(1).state_dict())  # what a checkpoint has
    trainer.register_hooks([ema])
    with caplog.at_level(logging.WARNING, "gn_detect"):
        trainer.train(3, 3)
    assert_equal(ema.model.state_dict(), model.state_dict())
    assert "no average" in caplog.text
