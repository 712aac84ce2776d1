"""Checkpoints are read back as they were, after whole, half and damaged writes."""

import json

import pytest
import torch

from editcore.delta import Delta, LowRank
from editcore.study import checkpoint
from editcore.study.checkpoint import RunState

IDENTITY = {"facts": "aa", "the model's weights": "bb"}


@pytest.fixture
def state():
    """A RunState after 3 edits of two parameters."""
    draw = torch.Generator().manual_seed(0)
    total = Delta({"a.weight": torch.randn(4, 3, generator=draw),
                   "b.bias": torch.randn(5, generator=draw)},
                  keys={"a": torch.randn(3, 3, generator=draw)})
    rows = [(0, "", "perplexity", float("inf")), (3, "7", "ES", 1.0),
            (3, "a.weight", "distance", 0.1 + 0.2)]
    random_state = torch.Generator().manual_seed(5).get_state()
    return RunState(3, total, rows, random_state, ("{}", "So. {}"), [0.5, 0.25], 9.0,
                    ["Rome", "São \N{REPLACEMENT CHARACTER}", ""])


def assert_same(a, b):
    for some, others in ((a.total.changes, b.total.changes), (a.total.keys, b.total.keys)):
        assert set(some) == set(others)
        assert all(torch.equal(some[name], others[name]) for name in some)
    assert torch.equal(a.random_state, b.random_state)
    for name in ("step", "rows", "contexts", "seconds", "elapsed", "answers"):
        assert getattr(a, name) == getattr(b, name), name


def test_round_trip_is_exact(tmp_path, state):
    checkpoint.save(tmp_path, state, IDENTITY)
    loaded, identity = checkpoint.load(tmp_path)
    assert_same(loaded, state)
    assert identity == checkpoint.identity_of(tmp_path) == IDENTITY
    assert checkpoint.steps(tmp_path) == 3


def test_before_the_first_edit(tmp_path, state):
    empty = RunState(0, Delta({}), [], state.random_state)
    checkpoint.save(tmp_path, empty, IDENTITY)
    assert_same(checkpoint.load(tmp_path)[0], empty)


def test_low_rank_totals_become_dense(tmp_path, state):
    total = Delta({"a": LowRank(torch.ones(4, 1), torch.ones(1, 3))}).dense()
    checkpoint.save(tmp_path, RunState(1, total, [], state.random_state), IDENTITY)
    assert torch.equal(checkpoint.load(tmp_path)[0].total.changes["a"], torch.ones(4, 3))


def test_nothing_there(tmp_path):
    folder = tmp_path / "none"
    assert checkpoint.load(folder) is None and checkpoint.steps(folder) is None
    assert checkpoint.identity_of(folder) == {}


def test_a_newer_one_takes_its_place_and_leaves_no_files(tmp_path, state):
    checkpoint.save(tmp_path, RunState(1, Delta({}), [], state.random_state), IDENTITY)
    checkpoint.save(tmp_path, state, IDENTITY)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.json", "rows-3.parquet", "weights-3.safetensors"]


@pytest.mark.parametrize("half", ["weights-9.safetensors", "rows-9.parquet"])
def test_a_kill_between_the_files_keeps_the_one_before(tmp_path, state, half):
    checkpoint.save(tmp_path, state, IDENTITY)
    (tmp_path / half).write_bytes(b"half")      # the head, written last, does not name it yet
    assert_same(checkpoint.load(tmp_path)[0], state)


@pytest.mark.parametrize("size", [-9, 0])
@pytest.mark.parametrize("name", ["weights-3.safetensors", "rows-3.parquet", "checkpoint.json"])
def test_damage_is_one_error_that_names_the_file(tmp_path, state, name, size):
    checkpoint.save(tmp_path, state, IDENTITY)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*{name}"):
        checkpoint.load(tmp_path)


def test_missing_file_and_missing_entry(tmp_path, state):
    checkpoint.save(tmp_path, state, IDENTITY)
    path = tmp_path / "checkpoint.json"
    head = json.loads(path.read_text())
    path.write_text(json.dumps({name: head[name] for name in head if name != "step"}))
    with pytest.raises(ValueError, match="damaged checkpoint: .*step"):
        checkpoint.load(tmp_path)
    path.write_text(json.dumps(head))
    (tmp_path / "rows-3.parquet").unlink()
    with pytest.raises(ValueError, match=r"rows-3\.parquet is missing"):
        checkpoint.load(tmp_path)


def test_identity_names_what_changed(tmp_path):
    checkpoint.check_identity(IDENTITY, dict(IDENTITY), tmp_path)
    with pytest.raises(ValueError, match=r"facts has changed since .* \(aa then, cc now\)"):
        checkpoint.check_identity(IDENTITY, IDENTITY | {"facts": "cc"}, tmp_path)
    with pytest.raises(ValueError, match=r"tasks has changed since .* \(None then, dd now\)"):
        checkpoint.check_identity(IDENTITY, IDENTITY | {"tasks": "dd"}, tmp_path)


def test_remove_leaves_nothing(tmp_path, state):
    folder = tmp_path / "c"
    checkpoint.save(folder, state, IDENTITY)
    checkpoint.remove(folder)
    checkpoint.remove(folder)
    assert not folder.exists()
