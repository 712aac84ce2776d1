"""Progress in; what is read back compared with it, after whole, half and damaged writes."""

import json

import pytest
import torch

from editcore.delta import Delta, LowRank
from editcore.study import checkpoint
from editcore.study.checkpoint import Progress

IDENTITY = {"facts": "aa", "the model's weights": "bb"}


@pytest.fixture
def progress():
    """A Progress after 3 edits of two parameters."""
    draw = torch.Generator().manual_seed(0)
    total = Delta({"a.weight": torch.randn(4, 3, generator=draw), "b.bias": torch.randn(5, generator=draw)})
    rows = [(0, "", "perplexity", float("inf")), (3, "7", "ES", 1.0), (3, "a.weight", "distance", 0.1 + 0.2)]
    return Progress(3, total, rows, torch.Generator().manual_seed(5).get_state(), (0.5, 0.25), 9.0, ("{}", "So. {}"))


def same(a, b):
    assert set(a.total.changes) == set(b.total.changes)
    assert all(torch.equal(a.total.changes[name], b.total.changes[name]) for name in a.total.changes)
    assert torch.equal(a.random_state, b.random_state)
    assert (a.step, a.rows, a.seconds, a.elapsed, a.contexts) == (b.step, b.rows, b.seconds, b.elapsed, b.contexts)


def test_round_trip_is_exact(tmp_path, progress):
    checkpoint.save(tmp_path, progress, IDENTITY)
    found, identity = checkpoint.load(tmp_path)
    same(found, progress)
    assert identity == checkpoint.identity_of(tmp_path) == IDENTITY


def test_before_the_first_edit(tmp_path, progress):
    empty = Progress(0, Delta({}), [], progress.random_state)
    checkpoint.save(tmp_path, empty, IDENTITY)
    same(checkpoint.load(tmp_path)[0], empty)


def test_low_rank_totals_are_kept_dense(tmp_path, progress):
    change = LowRank(torch.ones(4, 1), torch.ones(1, 3))
    checkpoint.save(tmp_path, Progress(1, Delta({"a": change}), [], progress.random_state), IDENTITY)
    assert torch.equal(checkpoint.load(tmp_path)[0].total.changes["a"], torch.ones(4, 3))


def test_nothing_there(tmp_path):
    assert checkpoint.load(tmp_path / "none") is None and checkpoint.identity_of(tmp_path / "none") == {}


def test_a_newer_one_takes_its_place_and_leaves_no_files(tmp_path, progress):
    checkpoint.save(tmp_path, Progress(1, Delta({}), [], progress.random_state), IDENTITY)
    checkpoint.save(tmp_path, progress, IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "rows-3.parquet",
                                                                "weights-3.safetensors"]


@pytest.mark.parametrize("half", ["weights-9.safetensors", "rows-9.parquet"])
def test_a_kill_between_the_files_keeps_the_one_before(tmp_path, progress, half):
    checkpoint.save(tmp_path, progress, IDENTITY)
    (tmp_path / half).write_bytes(b"half")      # the head, written last, does not name it yet
    same(checkpoint.load(tmp_path)[0], progress)


@pytest.mark.parametrize("name", ["weights-3.safetensors", "rows-3.parquet", "checkpoint.json"])
@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(path.read_bytes()[:-9]),
                                  lambda path: path.write_bytes(b"")], ids=["cut", "empty"])
def test_damage_is_one_error_that_names_the_file(tmp_path, progress, name, harm):
    checkpoint.save(tmp_path, progress, IDENTITY)
    harm(tmp_path / name)
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*{name}"):
        checkpoint.load(tmp_path)


def test_missing_file_and_missing_entry(tmp_path, progress):
    checkpoint.save(tmp_path, progress, IDENTITY)
    head = json.loads((tmp_path / "checkpoint.json").read_text())
    (tmp_path / "checkpoint.json").write_text(json.dumps({name: head[name] for name in head if name != "step"}))
    with pytest.raises(ValueError, match="damaged checkpoint: .*step"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoint.json").write_text(json.dumps(head))
    (tmp_path / "rows-3.parquet").unlink()
    with pytest.raises(ValueError, match=r"rows-3\.parquet is missing"):
        checkpoint.load(tmp_path)


def test_identity_names_what_changed(tmp_path):
    checkpoint.check_identity(IDENTITY, dict(IDENTITY), tmp_path)
    with pytest.raises(ValueError, match=r"facts has changed since the run began \(aa then, cc now\)"):
        checkpoint.check_identity(IDENTITY, IDENTITY | {"facts": "cc"}, tmp_path)
    with pytest.raises(ValueError, match=r"tasks has changed since the run began \(None then, dd now\)"):
        checkpoint.check_identity(IDENTITY, IDENTITY | {"tasks": "dd"}, tmp_path)


def test_remove_leaves_nothing(tmp_path, progress):
    checkpoint.save(tmp_path / "c", progress, IDENTITY)
    checkpoint.remove(tmp_path / "c")
    checkpoint.remove(tmp_path / "c")
    assert not (tmp_path / "c").exists()
