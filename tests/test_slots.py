"""Locks taken by processes of their own; some are killed, and what they held must be free for those that wait."""

import signal
import subprocess
import sys
import time

import pytest

from editcore import model
from editcore.study import slots

CHILD = """
import sys, time
from editcore import slots
with slots.held(sys.argv[1], sys.argv[2].split(","), shared=sys.argv[3] == "shared", poll=0.02) as index:
    print(index, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process that takes a slot and keeps it; all are killed at the end."""
    made = []

    def start(names="a,b", kind="alone"):
        made.append(subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), names, kind],
                                     stdout=subprocess.PIPE, text=True))
        return made[-1]
    yield start
    for child in made:
        child.kill()
        child.wait()
        child.stdout.close()


def waits(tmp_path, names, shared=False, seconds=0.3):
    """Whether nobody in this process gets a slot within so many seconds."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), ",".join(names),
                              "shared" if shared else "alone"], stdout=subprocess.PIPE, text=True)
    time.sleep(seconds + 0.3)
    child.kill()
    answer, _ = child.communicate()
    return answer == ""


def test_each_process_gets_a_slot_of_its_own_and_a_killed_one_frees_its(holder, tmp_path):
    first, second = holder(), None
    assert first.stdout.readline() == "0\n"
    second = holder()
    assert second.stdout.readline() == "1\n"
    assert waits(tmp_path, ["a", "b"])
    third = holder()                        # waits for one of the two
    first.send_signal(signal.SIGKILL)
    assert third.stdout.readline() == "0\n"
    second.send_signal(signal.SIGKILL)
    second.wait()
    with slots.held(tmp_path, ["a", "b"]) as index:
        assert index == 1
        assert waits(tmp_path, ["a", "b"])
    with slots.held(tmp_path, ["b"]):
        pass                                # left at the end of the block above


def test_shared_holders_keep_out_one_that_wants_it_alone(holder, tmp_path):
    one, two = holder("a", "shared"), holder("a", "shared")
    assert one.stdout.readline() == two.stdout.readline() == "0\n"
    assert waits(tmp_path, ["a"]) and not waits(tmp_path, ["a"], shared=True)
    one.kill()
    two.kill()
    one.wait(), two.wait()
    with slots.held(tmp_path, ["a"]):
        assert waits(tmp_path, ["a"], shared=True)


def test_a_slot_is_left_when_the_work_fails(tmp_path):
    with pytest.raises(RuntimeError, match="work"), slots.held(tmp_path, ["a"]):
        raise RuntimeError("work")
    with slots.held(tmp_path, ["a"]) as index:
        assert index == 0
    with pytest.raises(ValueError, match="nothing to lock"), slots.held(tmp_path, []):
        pass


def test_gpus_are_named_by_what_they_are_and_children_see_the_chosen_one(monkeypatch):
    """Two jobs on one machine may each see their GPU as number 0: the lock's name must be the card's."""
    cuda = model.torch.cuda
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_properties", lambda i: type("Card", (), {"uuid": f"card-{7 + i}"}))
    chosen = []
    monkeypatch.setattr(cuda, "set_device", chosen.append)
    assert model.gpus() == ["gpu-card-7", "gpu-card-8"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    model.use_gpu(1)
    assert chosen == [1] and model.os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    model.use_gpu(1)
    assert model.os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    assert model.gpus() == []
