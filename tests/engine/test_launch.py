"""What is started beside the processes of a run."""

import multiprocessing
import os
import signal
from multiprocessing import resource_tracker

from gn_detect.engine.launch import _start_tracker


def signal_tracker(pipe) -> None:
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None  # as in a process that has just begun
    _start_tracker()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        os.kill(tracker._pid, signum)  # the first that it does not outlive ends it
    ended_by = os.waitpid(tracker._pid, 0)[1]
    pipe.send((ended_by, signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def test_the_resource_tracker_outlives_a_signal_to_all_processes():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=signal_tracker, args=(there,))
    process.start()
    assert here.poll(60)
    assert here.recv() == (signal.SIGKILL, False)
    process.join()
