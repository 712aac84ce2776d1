"""editcore.files: whole files or none, hashes, errors that name the file."""

import hashlib
import tempfile

import pytest
import torch

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
    assert list(path.parent.iterdir()) == [path]


def test_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6.0).view(2, 3), "turned": torch.arange(6).view(2, 3).T}
    metadata = {"format": "one-1", "count": 7, "info": {"é": [1, "2"]}}
    files.save_tensors(path, tensors, metadata)
    again, words = files.load_tensors(path)
    assert path.stat().st_mode & 0o777 == 0o644
    assert words == metadata and again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("read, content, words", [
    (files.read_json, None, "no such file"),
    (files.read_json, b"{", "not valid JSON"),
    (files.read_json, b"\xff\xfe", "not valid JSON"),
    (files.load_tensors, None, "no such file"),
    (files.load_tensors, b"12345678 no tensors", "not a safetensors file, or damaged"),
    (files.load_tensors, b"", "not a safetensors file, or damaged"),
])
def test_errors_name_the_file(read, content, words, tmp_path):
    path = tmp_path / "bad.file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=f"bad.file: {words}"):
        read(path)


def test_hashes():
    assert files.sha256_text("ab", "c") == hashlib.sha256(b"ab\0c\0").hexdigest()
    assert files.sha256_text("ab", "c") != files.sha256_text("a", "bc")
    assert files.sha256_text("a", 1) == files.sha256_text("a", "1")


@pytest.mark.parametrize("variables, folder", [
    ({"EDITCORE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    ({"XDG_CACHE_HOME": "/b"}, "/b/editcore"),
    ({"HOME": "/c"}, "/c/.cache/editcore"),
])
def test_cache_folder(variables, folder, monkeypatch):
    for name in ("EDITCORE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(files.cache_folder()) == folder


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    for name in ("EDITCORE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)    # what it does without a home
    assert str(files.cache_folder()).startswith(f"{tempfile.gettempdir()}/cache-")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with files.atomic_folder(tmp_path / "new" / "model") as beside:
        (beside / "a.txt").write_text("a")
        (beside / "a.txt").chmod(0o600)
        assert not (tmp_path / "new" / "model").exists()
    assert (tmp_path / "new/model/a.txt").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "new/model").stat().st_mode & 0o777 == 0o755
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "other") as beside:
        (beside / "a.txt").write_text("a")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
