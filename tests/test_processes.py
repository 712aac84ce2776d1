"""Jobs in processes: what they yield, how they fail, and that none outlives its parent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from editcore import processes


def count(number, fail=None):
    """Yield numbers, then fail in one of several ways."""
    yield from range(number)
    if fail == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fail == "end":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fail == "odd":
        raise Odd(1, 2)
    elif fail:
        raise fail


def beat(folder, name):
    """Write down twenty times per second that the process lives."""
    for number in range(2000):
        (Path(folder) / name).write_text(f"{os.getpid()} {number}")
        time.sleep(0.05)
        yield number


class Odd(Exception):
    """An exception that cannot be sent."""

    def __init__(self, a, b):
        super().__init__(a)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_items_of_all_jobs_come(workers):
    jobs = {"a": (2,), "b": (0,), "c": (3,)}
    items = list(processes.in_processes(count, jobs, workers))
    assert sorted(items) == [("a", 0), ("a", 1), ("c", 0), ("c", 1), ("c", 2)]


@pytest.mark.parametrize("fail, message", [
    (ValueError("bad"), "bad"), ("odd", "Odd: 1"), (KeyError("x"), "KeyError: 'x'"),
    ("kill", "its process was ended by signal SIGKILL; the same command goes on from there")])
def test_a_job_that_fails_is_an_item_and_the_others_go_on(fail, message):
    jobs = {"a": (1, fail), "b": (1,), "c": (1,)}
    items = list(processes.in_processes(count, jobs, 1))
    errors = {name: item for name, item in items if isinstance(item, Exception)}
    assert list(errors) == ["a"] and str(errors["a"]) == message
    assert [item for item in items if item[1] == 0] == [("a", 0), ("b", 0), ("c", 0)]


def test_no_job_begins_after_a_process_was_told_to_end():
    items = list(processes.in_processes(count, {"a": (1, "end"), "b": (1,)}, 1))
    assert [name for name, _ in items] == ["a", "a"] and "SIGTERM" in str(items[1][1])


def beats(folder):
    """What the processes wrote last."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def stop_beating(folder):
    """Wait for the processes to be silent; they must."""
    for _ in range(50):
        before = beats(folder)
        time.sleep(0.2)
        if beats(folder) == before:
            return before
    raise AssertionError("a process goes on")


def test_a_closed_loop_ends_its_processes(tmp_path):
    jobs = {name: (str(tmp_path), name) for name in "abc"}
    with contextlib.closing(processes.in_processes(beat, jobs, 2)) as items:
        next(items)
    assert set(stop_beating(tmp_path)) <= {"a", "b"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_their_parent(tmp_path, number):
    source = ("import signal, sys; sys.path.insert(0, sys.argv[2]); from editcore import cli\n"
              "import test_processes; from editcore.processes import in_processes\n"
              "signal.signal(signal.SIGTERM, cli.end_politely)\n"
              "signal.signal(signal.SIGINT, cli.end_politely)\n"
              "jobs = {name: (sys.argv[1], name) for name in 'abc'}\n"
              "for _ in in_processes(test_processes.beat, jobs, 2): pass\n")
    words = [sys.executable, "-c", source, str(tmp_path), str(Path(__file__).parent)]
    child = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while len(beats(tmp_path)) < 2:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(20) != 0
    assert set(stop_beating(tmp_path)) == {"a", "b"}, "the waiting job was not begun"


@pytest.mark.parametrize("load, words, workers, threads", [
    (0.0, "", 1, 8), (0.0, "", 2, 4), (7.6, "", 1, 1), (20.0, "", 1, 1), (3.9, "", 2, 2),
    (0.0, "3", 2, 3), (0.0, "0", 1, 8), (0.0, "many", 1, 8)])
def test_threads_are_those_that_are_free(monkeypatch, load, words, workers, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", words)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    assert processes.free_threads(workers) == threads
