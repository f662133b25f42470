"""A run that is asked to stop, at any moment, and what it has lost when it goes on: nothing."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch
from engine.trainers import PERIODS, build_trainer, train_lazy
from helpers import CocoFiles, assert_equal, record_images, weights

from gn_detect.engine import lazy, stopping
from gn_detect.engine.stopping import SIGNALS, Stopped, handle_signals, request, stop_as_others

BY_RESUME = "go on with --resume (same command)"


@pytest.fixture(autouse=True)
def hangups_count():
    """Also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(signum: int = signal.SIGTERM) -> None:
    signal.raise_signal(signum)  # to this thread, so that it is handled at once


@contextlib.contextmanager
def stops(signum: int, message: str):
    with pytest.raises(Stopped) as error, handle_signals():
        yield
    assert error.value.code == (130 if signum == signal.SIGINT else 143)
    assert error.value.message == f"{signal.Signals(signum).name}: stopped {message}"


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_stops_at_once_before_training(signum):
    before = [signal.getsignal(s) for s in SIGNALS]
    with stops(signum, "before the first step: nothing was trained yet"):
        send(signum)
        pytest.fail("went on")
    assert [signal.getsignal(s) for s in SIGNALS] == before
    with handle_signals():
        request.stop()  # that one is over


def test_a_stop_is_no_error():
    assert not issubclass(Stopped, Exception)
    with handle_signals("nothing was evaluated"), pytest.raises(Stopped) as error:
        try:
            send()
        except Exception:
            pytest.fail("taken for one")
    assert error.value.message == "SIGTERM: stopped nothing was evaluated"


@pytest.mark.parametrize(
    "first, second, after, ends",
    [
        (signal.SIGINT, signal.SIGINT, 1.1, True),
        (signal.SIGINT, signal.SIGINT, 0.9, False),  # the same Ctrl-C, from another side
        (signal.SIGTERM, signal.SIGTERM, 9, False),
        (signal.SIGUSR1, signal.SIGTERM, 9, False),
        (signal.SIGTERM, signal.SIGINT, 9, False),
    ],
)
def test_a_second_signal(monkeypatch, first, second, after, ends):
    now, exits = [0.0], []
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "_exit", exits.append)
    with handle_signals():
        request.waits = True
        send(first)
        now[0] = after
        send(second)
        assert exits == [130] * ends
        assert request.signum == first
        assert request.agree() == (True, False)


def test_a_fork_takes_no_notice():
    with handle_signals():
        if not (child := os.fork()):
            with contextlib.suppress(Stopped):
                send()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert request.agree() == (False, False)


def test_a_stop_that_something_swallowed_is_not_forgotten():
    with stops(signal.SIGTERM, "in the evaluation before the first step: nothing was trained yet"):
        with contextlib.suppress(Stopped):  # as Python does in __del__
            send()
        with request.immediately("in the evaluation "):
            pytest.fail("began")


def test_an_error_that_follows_from_the_stop_of_another_process():
    """Its connection is lost, where this one has waited for it."""
    with stops(signal.SIGTERM, "before the first step: nothing was trained yet"):
        with request.immediately(""):
            request.signum = signal.SIGTERM
            raise RuntimeError("Connection closed by peer")
    with handle_signals(), pytest.raises(RuntimeError), request.immediately(""):
        raise RuntimeError("of its own")


@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_stops_as_another_one_has(monkeypatch, caplog, hangs):
    """By its main thread; without, where that hangs in a collective operation."""
    over, exits = threading.Event(), []
    time = SimpleNamespace(sleep=lambda seconds: hangs or over.wait(60), monotonic=lambda: 0.0)
    monkeypatch.setattr(stopping, "time", time)
    monkeypatch.setattr(os, "_exit", exits.append)
    thread = threading.Thread(target=stop_as_others, args=(signal.SIGINT,))
    with pytest.raises(Stopped) as error, handle_signals("in the middle"):
        request.waits = hangs
        thread.start()
        thread.join(60)
        request.stop()
    over.set()
    thread.join()
    assert exits == [130]
    assert error.value.message == "SIGINT: stopped in the middle"
    assert caplog.messages == [error.value.message] * hangs  # otherwise who catches it says it


OPTIONS = ("SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights, and images in their order, of 6 iterations that nothing has stopped."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trainer = build_trainer(CocoFiles(root / "data"), "run", *OPTIONS)
        seen = record_images(trainer)
        trainer.train()
    return weights(trainer), seen


def at(trainer, place: str, iteration: int, act) -> None:
    """Call ``act`` once, in a "step" of an iteration, or in the "evaluation", in the "save" or
    "behind" all of that, after it."""
    done = []

    def act_once(now: bool):
        if now and trainer.iter == iteration and not done:
            done.append(True)
            act()

    def before(function, now=lambda: True):
        def changed(*args, **kwargs):
            act_once(now())
            return function(*args, **kwargs)

        return changed

    if place == "start":
        trainer._resume.before_train = before(trainer._resume.before_train)
    elif place == "save":
        trainer.checkpointer.tag_last_checkpoint = before(trainer.checkpointer.tag_last_checkpoint)
    elif place == "behind":
        trainer._hooks[-1].after_step = before(trainer._hooks[-1].after_step)
    else:
        model, training = trainer.model, place == "step"
        model.register_forward_pre_hook(lambda *_: act_once(model.training == training))


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, iteration, signum, file, done",
    [
        ("step", 0, signal.SIGINT, "latest", 1),
        ("step", 1, signal.SIGTERM, "latest", 2),  # and is not evaluated
        ("step", 3, signal.SIGUSR1, "0000003", 4),
        ("step", 5, signal.SIGTERM, "final", 6),
        ("save", 1, signal.SIGTERM, "latest", 2),  # before an evaluation
        ("save", 3, signal.SIGTERM, "0000003", 4),
        ("save", 5, signal.SIGINT, "final", 6),
        ("evaluation", 1, signal.SIGTERM, "latest", 2),
        ("evaluation", 3, signal.SIGUSR1, "0000003", 4),
        ("evaluation", 6, signal.SIGINT, "final", 6),
        ("behind", 1, signal.SIGTERM, "latest", 3),  # the step that follows is finished
        ("behind", 5, signal.SIGTERM, "final", 6),
    ],
)
def test_nothing_is_lost(train, tmp_path, whole, place, iteration, signum, file, done):
    trainer = train("run", *OPTIONS)
    at(trainer, place, iteration, lambda: send(signum))
    evaluated, seen = record_evaluations(trainer), record_images(trainer)
    path = f"run/model_{file}.pth"
    interrupts = place == "evaluation" or (place, done) == ("behind", 6)
    doing = "in the evaluation " if interrupts else ""
    with stops(signum, f"{doing}after iteration {done}; {path} has it: {BY_RESUME}"):
        trainer.train()
    # Of the checkpoint itself there was no evaluation, or it has begun.
    assert evaluated == [i for i in (2, 4) if i < done] + [done] * (place == "evaluation")
    assert (tmp_path / "run" / "last_checkpoint").read_text() == os.path.basename(path)
    assert torch.load(path)["iteration"] == done - 1
    rows = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert max(json.loads(row)["iteration"] for row in rows) == done - 1

    resumed = train("run", *OPTIONS, "SEED", 99, resume=True)
    evaluated, also_seen = record_evaluations(resumed), record_images(resumed)
    resumed.train()
    assert evaluated == [i for i in (2, 4, 6) if i >= done]
    assert_equal(weights(resumed), whole[0])
    assert list(map(names, seen + also_seen)) == list(map(names, whole[1]))
    left = {p.name for p in (tmp_path / "run").glob("*.pth")}
    assert left == {"model_0000003.pth", "model_final.pth", "model_best.pth"}


def names(files: list[str]) -> list[str]:
    return [os.path.basename(file) for file in files]


def record_evaluations(trainer) -> list[int]:
    """After how many iterations it has begun an evaluation, from now on."""
    begun, test = [], trainer.test

    def record(*args):
        begun.append(min(trainer.storage.iter + 1, trainer.max_iter))
        return test(*args)

    trainer.test = record
    return begun


@pytest.mark.slow
def test_a_stop_before_the_first_step(train, tmp_path):
    trainer = train("run", *OPTIONS)
    at(trainer, "start", 0, lambda: setattr(request, "signum", signal.SIGTERM))
    with stops(signal.SIGTERM, "before the first step: nothing was trained yet"):
        trainer.train()
    assert not list((tmp_path / "run").glob("*.pth"))

    with stops(signal.SIGTERM, f"after iteration 1; run/model_latest.pth has it: {BY_RESUME}"):
        trainer = train("run", *OPTIONS)
        at(trainer, "step", 0, send)
        trainer.train()
    before = (tmp_path / "run" / "model_latest.pth").read_bytes()
    resumed = train("run", *OPTIONS, resume=True)
    at(resumed, "start", 1, lambda: setattr(request, "signum", signal.SIGTERM))
    message = "before the first step of this run; the checkpoint of iteration 1 is as it was: "
    with stops(signal.SIGTERM, message + BY_RESUME):
        resumed.train()
    assert (tmp_path / "run" / "model_latest.pth").read_bytes() == before


@pytest.mark.slow
def test_loading_workers_take_no_notice(train, tmp_path):
    """Of signals to all processes of the run, in a step that has yet to wait for its images."""
    options = (*OPTIONS, "DATALOADER.NUM_WORKERS", 2, "SOLVER.ACCUMULATE_STEPS", 2)
    options += ("SOLVER.IMS_PER_BATCH", 4, "DATASETS.TEST", ())

    def signal_all():
        workers = trainer._trainer._data_loader_iter._workers
        pids = [str(pid) for pid in (*(worker.pid for worker in workers), os.getpid())]
        for name in ("TERM", "USR1", "INT"):
            subprocess.run(["kill", f"-{name}", *pids], check=True)

    whole = train("whole", *options)
    expected = record_images(whole)
    whole.train()
    trainer = train("run", *options)
    seen = record_images(trainer)
    at(trainer, "step", 2, signal_all)
    with stops(signal.SIGTERM, f"after iteration 3; run/model_latest.pth has it: {BY_RESUME}"):
        trainer.train()
    workers = trainer._trainer._data_loader_iter._workers
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:  # as at the exit of their parent
        worker.terminate()
        worker.join(timeout=60)
        assert worker.exitcode == 0
    resumed = train("run", *options, "SEED", 99, resume=True)
    also_seen = record_images(resumed)
    resumed.train()
    assert seen + also_seen == expected


@pytest.mark.slow
def test_a_lazy_run_is_stopped_too(lazy_data, tmp_path, monkeypatch):
    def run(output, resume=False):
        cfg = lazy_data(f"train.output_dir={tmp_path / output}", *PERIODS)
        return train_lazy(cfg, "model_final", resume=resume)

    whole = run("whole")
    step = lazy.build_loop.__globals__["AccumulatingTrainer"].run_step
    latest, trained = tmp_path / "run" / "model_latest.pth", []

    def run_step(trainer):
        trained.append(trainer.iter)
        if trained == [0]:
            send(signal.SIGUSR1)
        step(trainer)

    monkeypatch.setattr("gn_detect.engine.trainer.AccumulatingTrainer.run_step", run_step)
    with stops(signal.SIGUSR1, f"after iteration 1; {latest} has it: {BY_RESUME}"):
        run("run")
    with monkeypatch.context() as context, handle_signals():
        context.setattr(lazy, "inference_on_dataset", lambda *_: send())
        with pytest.raises(Stopped) as error:
            run("run", resume=True)
    evaluated = "SIGTERM: stopped in the evaluation after iteration 2"
    assert error.value.message == f"{evaluated}; {latest} has it: {BY_RESUME}"
    assert_equal(run("run", resume=True), whole)
    assert trained == [0, 1, 2, 3]
    assert not latest.exists()


def test_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handle_signals():
        send(signal.SIGHUP)
        assert not request.signum
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
