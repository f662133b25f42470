"""What the tools add to Detectron2's arguments."""

import argparse

import pytest
import torch.distributed as dist
from detectron2.engine import default_argument_parser

from gn_detect.config import ConfigError
from gn_detect.engine.launch import _gpu, argument_parser, launch, parse_args
from gn_detect.engine.meeting import Place


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr("sys.argv", ["train_net.py", *arguments])
        return parse_args(argument_parser())

    return parse


@pytest.mark.parametrize(
    "arguments, resume, opts",
    [
        ("", False, []),
        ("SOLVER.MAX_ITER 3", False, ["SOLVER.MAX_ITER", "3"]),
        ("--resume", True, []),
        ("--resume SOLVER.MAX_ITER 3", True, ["SOLVER.MAX_ITER", "3"]),
        ("--resume train.max_iter=3", True, ["train.max_iter=3"]),
        ("--resume --num-gpus 2 SOLVER.MAX_ITER 3", True, ["SOLVER.MAX_ITER", "3"]),
        ("--resume auto", "auto", []),
        ("--resume auto SOLVER.MAX_ITER 3", "auto", ["SOLVER.MAX_ITER", "3"]),
        ("--resume=auto train.max_iter=3", "auto", ["train.max_iter=3"]),
        ("--resume auto --num-gpus 2 SOLVER.MAX_ITER 3", "auto", ["SOLVER.MAX_ITER", "3"]),
    ],
)
def test_resume(arguments, resume, opts, parse):
    args = parse("--config-file", "a.yaml", *arguments.split())
    assert (args.config_file, args.resume, args.opts) == ("a.yaml", resume, opts)


@pytest.mark.parametrize("resume, expected", [("--resume", True), ("--resume auto", "auto")])
def test_resume_to_evaluate(resume, expected, parse):
    for arguments in (f"{resume} --eval-only", f"--eval-only {resume}"):
        args = parse(*arguments.split())
        assert (args.resume, args.eval_only, args.opts) == (expected, True, [])


def test_the_rest_is_detectron2s(parse):
    args, theirs = vars(parse()), vars(default_argument_parser().parse_args([]))
    assert args.keys() == theirs.keys() | {"dist_timeout"}
    differ = {name for name in theirs if args[name] != theirs[name]}
    assert differ == {"num_gpus", "dist_url"}  # None: they were not given
    assert args["dist_timeout"] == 300
    assert parse("--dist-timeout", "1.5").dist_timeout == 1.5


@pytest.mark.parametrize(
    "env",
    [
        {},
        # sbatch without srun, or srun of one task.
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "a", "SLURM_NTASKS": "1"},
        # An allocation (salloc) of several tasks, of which srun starts none.
        {"SLURM_NTASKS": "2", "SLURM_NODELIST": "a[1-2]", "SLURM_JOB_ID": "1"},
    ],
)
@pytest.mark.parametrize("resume", ["", "--resume auto"])
def test_one_process_forms_no_group(env, resume, parse, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    called = []
    launch(lambda args: called.append((args, dist.is_initialized())), parse(*resume.split()))
    ((args, initialized),) = called
    assert (args.resume, args.num_gpus, args.num_machines) == (bool(resume), 1, 1)
    assert not initialized


@pytest.mark.parametrize("step, tasks", [({}, False), ({"SLURM_STEP_ID": "0"}, True)])
def test_a_batch_script_that_starts_the_processes_itself(step, tasks, parse, monkeypatch):
    """Without srun; Slurm gives it the variables of its first task."""
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    for name, value in (variables | {"SLURM_NODELIST": "gpu1"} | step).items():
        monkeypatch.setenv(name, value)
    started = []
    module = "gn_detect.engine.launch"
    monkeypatch.setattr(f"{module}._start", lambda *_: started.append("processes"))
    monkeypatch.setattr(f"{module}._in_group", lambda *_: started.append("a task"))
    launch(None, parse("--num-gpus", "2"))
    assert started == ["a task" if tasks else "processes"]


def test_one_process_for_each_gpu():
    def place(local_rank: int, started_by: str) -> Place:
        return Place(local_rank, 4, local_rank, 0, "tcp://gpu1:1", started_by)

    assert [_gpu(place(rank, "torchrun"), 4) for rank in range(4)] == [0, 1, 2, 3]
    assert _gpu(place(3, "srun"), 1) == 0  # bound to its own one
    for started_by, count in (("torchrun", 1), ("srun", 2)):
        with pytest.raises(ConfigError, match=rf"local rank 2 on .* sees {count} GPU"):
            _gpu(place(2, started_by), count)
