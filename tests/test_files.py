"""editcore.files: whole files or none, hashes, errors that name the file."""

import hashlib

import pytest

from editcore import files


def test_atomic_replaces_on_success_and_keeps_on_failure(tmp_path):
    path = tmp_path / "new" / "rows.txt"
    with files.atomic(path) as tmp:
        assert tmp.suffix == path.suffix and tmp.parent == path.parent
        tmp.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError, match="stop"), files.atomic(path) as tmp:
        tmp.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "first"
    assert [one.name for one in path.parent.iterdir()] == ["rows.txt"]


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"é": [1, 2.5, None]})
    assert files.read_json(path) == {"é": [1, 2.5, None]}
    with pytest.raises(FileNotFoundError, match="missing.json"):
        files.read_json(tmp_path / "missing.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="a.json: not valid JSON"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.json"):
        files.read_json(path)


def test_hashes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 1000)
    assert files.sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()
    assert files.sha256_text("ab", "c") != files.sha256_text("a", "bc")
    assert files.sha256_text("a", 1) == files.sha256_text("a", "1")
