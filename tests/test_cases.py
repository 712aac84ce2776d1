"""What users of such tools report: each input ends in one clear line, or as it should."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from editcore import model as models
from editcore import tokens

# Folders of models ----------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 26873\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    tok = byte_tokenizer()
    make("llama", len(tok)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def put(name, content):
    """Return a change of a folder: this file has this content; None removes it."""
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    return change


def config(**values):
    """Return a change of a folder: these values in config.json."""
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return change


def weights(edit):
    """Return a change of a folder: edit({name: tensor}) of its weights."""
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return change


def cut(share):
    """Return a change of a folder: its weights are cut after this share of their bytes."""
    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    return change


def renamed(new, beside=None):
    """Return a change of a folder: the weights have another name; beside: (name, content)."""
    def change(folder):
        (folder / "model.safetensors").rename(folder / new)
        if beside:
            put(*beside)(folder)
    return change


def index(*names):
    """Return a change of a folder: an index that names these files."""
    content = {"metadata": {}, "weight_map": {f"x{i}": name for i, name in enumerate(names)}}
    return renamed("model-1.safetensors", ("model.safetensors.index.json",
                                           json.dumps(content).encode()))


def moved(folder):
    """The model lies one folder below."""
    files = list(folder.iterdir())
    (folder / "v1").mkdir()
    for path in files:
        path.rename(folder / "v1" / path.name)


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def foreign(folder):
    """Code of its own, which leaves a mark if it runs."""
    config(model_type="mine", auto_map={"AutoConfig": "mine.Mine"})(folder)
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def other_tokenizer(folder):
    byte_tokenizer(size=500).save_pretrained(folder)


def not_a_number(value):
    def edit(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    return weights(edit)


def wider(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(70, 32)


DOWN = "model.layers.2.mlp.down_proj.weight"
FOLDERS = [     # (change of a whole folder, words of the error)
    (put("model.safetensors", POINTER), "model.safetensors: a pointer of Git LFS.*git lfs pull"),
    (put("model.safetensors", b""), "model.safetensors: empty"),
    (put("model.safetensors", b"<!DOCTYPE html><html>"), "model.safetensors: a web page"),
    (put("model.safetensors", b"PK\3\4 pickle"), "model.safetensors: a pickle or zip"),
    (put("model.safetensors", b"nonsense of some length"), "model.safetensors: damaged"),
    (cut(.5), "model.safetensors: damaged or cut short"),
    (cut(.999), "model.safetensors: damaged or cut short"),
    (put("model.safetensors", struct.pack("<Q", 2) + b"{}"), "asks for 4 layers, but .* hold 0"),
    (put("model.safetensors", None), r"no weights in it \(model.safetensors\)"),
    (renamed("pytorch_model.bin"), "its weights are pickle files"),
    (renamed("consolidated.00.pth"), "its weights are pickle files"),
    (renamed("tf_model.h5"), "those of another framework"),
    (renamed("weights.safetensors"), "no model.safetensors in it.*weights.safetensors"),
    (renamed("x.gguf"), r"a GGUF file; give the file itself: .*whole/x.gguf"),
    (put("adapter_config.json", b"{}"), "an adapter .*merge"),
    (put("config.json", None), "no config.json beside the weights"),
    (moved, "no config.json in it, but one below; give .*v1"),
    (put("config.json", POINTER), "config.json: a pointer"),
    (put("config.json", b"[1]"), "config.json is not an object, but list"),
    (put("config.json", b"7"), "config.json is not an object, but int"),
    (put("config.json", b"{"), "config.json: not valid JSON"),
    (put("config.json", b"{}"), "config.json: model_type is None"),
    (config(model_type=["llama"]), r"config.json: model_type is \['llama'\]"),
    (config(model_type="bert"), "architecture 'bert' is not in LAYOUTS"),
    (config(model_type="gemma2"), "architecture 'gemma2' is not in LAYOUTS"),
    (foreign, "architecture 'mine' is not in LAYOUTS.*code that came with it.*never run"),
    (config(quantization_config={"quant_method": "gptq"}), r"quantised weights \(gptq\)"),
    (config(quantization_config={"quant_method": "bitsandbytes"}), "quantised weights"),
    (config(quantization_config={"quant_method": "awq"}), r"quantised weights \(awq\)"),
    (config(num_hidden_layers=6), "asks for 6 layers, but the weights hold 4"),
    (config(num_hidden_layers=3), "asks for 3 layers, but the weights hold 4"),
    (config(num_hidden_layers=10 ** 9), "asks for 1000000000 layers, but the weights hold 4"),
    (config(num_hidden_layers="4"), "config.json: cannot be loaded"),
    (config(hidden_size="wide"), "config.json: cannot be loaded"),
    (config(hidden_size=64), r"embed_tokens.weight is \[400, 32\], but by config.json \[400, 64\]"),
    (config(vocab_size=500), "embed_tokens.weight is .400, 32.*500, 32"),
    (config(intermediate_size=80), r"mlp.* is \(.*in the file, but by config.json"),
    (config(num_attention_heads=5), "cannot be loaded"),
    (config(attention_bias=True), "the weights lack 16 tensors .*bias"),
    (config(tie_word_embeddings=True, architectures=None), None),
    (weights(lambda tensors: tensors.pop(DOWN)), "lack 1 tensors.*layers.2.mlp.down_proj"),
    (weights(lambda tensors: tensors.pop("lm_head.weight")), "lack 1 tensors.*lm_head"),
    (weights(lambda tensors: tensors.update(extra=tensors["lm_head.weight"].clone())),
     "hold 1 tensors that .* such as extra"),
    (weights(wider), r"layers.2.mlp.up_proj.weight is \(70, 32\) in the file.*\(64, 32\)"),
    (not_a_number(float("nan")), "layers.1.mlp.down_proj.weight has entries that are NaN"),
    (not_a_number(-float("inf")), "layers.1.mlp.down_proj.weight has entries that are NaN"),
    (index("../model.safetensors"), "names '../model.safetensors', which lies outside"),
    (index("/etc/passwd"), "names '/etc/passwd', which lies outside"),
    (index("model-1.safetensors", "model-2.safetensors"), "'model-2.safetensors', which is not th"),
    (renamed("model-1.safetensors", ("model.safetensors.index.json", b"[]")), "no weight_map"),
    (renamed("model-1.safetensors", ("model.safetensors.index.json", POINTER)), "a pointer"),
    (no_tokenizer, "whole: no tokenizer in it"),
    (put("tokenizer.json", POINTER), "tokenizer.json: a pointer of Git LFS"),
    (put("tokenizer.json", b"{}"), "tokenizer .*whole: cannot be loaded"),
    (put("tokenizer_config.json", b"[]"), "tokenizer .*whole: cannot be loaded"),
    (other_tokenizer, "the tokenizer has 5.. ids, but the model's embedding has 400 rows"),
    (put("generation_config.json", b"["), None),
    (config(pad_token_id=10 ** 6), r"cannot be loaded \(Padding_idx"),
]


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_model_folders(whole, tmp_path, capfd, monkeypatch, number):
    change, words = FOLDERS[number]
    folder = shutil.copytree(whole, tmp_path / "whole")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    change(folder)
    if words is None:
        assert models.load(folder)
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            models.load(folder)
        assert "\n" not in str(error.value) and "whole" in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name, words", [
    ("./nosuch/model", "no such folder"), ("~/models/nosuch", "no such folder"),
    (r"C:\models\x", "no such folder"), ("C:/models/x", "no such folder"),
    ("../x", "no such folder"), ("/x", "no such folder"), ("a/b/c", "no such folder"),
    ("gpt2/", "no such folder"), ("data/pockt", "no such folder; did you mean data/pocket?"),
    ("pockt", "no such model; did you mean 'pocket'?"), ("README.md", "a file; give the folder"),
    ("nosuch.gguf", "no such file"),
])
def test_names_that_mean_no_model(name, words, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(ValueError, match=words):
        models.load(name)


def test_pocket_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SHORT_NAMES, "pocket", tmp_path / "data" / "pocket")
    with pytest.raises(ValueError, match="checkout of the repository.*pip install -e"):
        models.load("pocket")


def test_an_end_token_is_no_part_of_a_text():
    tok = byte_tokenizer()
    plain = tokens.encode_pairs(tok, [("Orla is in", "Rome")])
    start = tokens.text_start(tok)
    span = tokens.subject_span(tok, "{} is in", "Orla")
    end = [("<|endoftext|>", 0)]
    tok.backend_tokenizer.post_processor = TemplateProcessing("$A <|endoftext|>", None, end)
    assert tok("Orla")["input_ids"][-1] == 0
    assert tokens.encode_pairs(tok, [("Orla is in", "Rome")]) == plain
    assert tokens.text_start(tok) == start
    assert tokens.subject_span(tok, "{} is in", "Orla") == span
