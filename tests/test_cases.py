"""What users of such tools report: each input ends in one clear line, or as it should."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, chat_tokenizer, make
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, trainers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from editcore import delta, metrics, tokens
from editcore import model as models
from editcore.facts import fact, marked, read_facts
from editcore.files import read_lines
from editcore.instructedit import records
from editcore.study.run import check_prompts

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
    (weights(lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)})),
     "layers.2.mlp.down_proj.weight is of I8: quantised weights"),
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


# Files of edits -------------------------------------------------------------------------------

DELTA = {"format": "editcore-delta-1", "info": "{}"}
PATCH = {"format": "editcore-patch-1", "info": "{}"}
BOOK = '{"m": {"kind": "codebook", "labels": ["a"]}}'
MATRIX = {"w": torch.ones(2, 2)}
KEYS = {f"m/{name}": torch.ones(1, 2) for name in ("keys", "values")}
DELTAS = [      # (tensors, metadata, words of the error)
    (MATRIX, {}, "its metadata names no format"),
    (MATRIX, {"format": "pt"}, "its format is 'pt'"),
    (MATRIX, {"format": "editcore-stats-1", "count": "5"}, "its format is 'editcore-stats-1'"),
    (MATRIX, {"format": "editcore-delta-2"}, "its format is 'editcore-delta-2'"),
    (MATRIX, {"format": "7"}, "its format is 7"),
    (MATRIX, {"format": '["editcore-delta-1"]'}, "its format is"),
    (MATRIX, DELTA | {"info": "[]"}, r"its info is not a JSON object, but \[\]"),
    (MATRIX, DELTA | {"info": '[["a", 1]]'}, "its info is not a JSON object"),
    (MATRIX, DELTA | {"info": "text"}, "its info is not a JSON object, but 'text'"),
    (MATRIX, DELTA | {"info": "7"}, "its info is not a JSON object, but 7"),
    (MATRIX, DELTA | {"info": "null"}, "its info is not a JSON object, but None"),
    (MATRIX, DELTA | {"info": "[" * 10 ** 5}, "its info is not a JSON object"),
    (MATRIX, DELTA | {"info": '{"model_hash": 7}'}, "its model_hash is 7, but must be str"),
    (MATRIX, DELTA | {"info": '{"model_hash": null}'}, "its model_hash is None, but must be str"),
    (MATRIX, DELTA | {"info": '{"dtype": ["float32"]}'}, "its dtype is .*, but must be str"),
    (MATRIX, DELTA | {"info": '{"edits": "many"}'}, "its edits is 'many', but must be int"),
    (MATRIX, DELTA | {"info": '{"editor": {}}'}, "its editor is {}, but must be str"),
    ({}, DELTA, "no tensors in it"),
    ({"w": torch.tensor([[1.0, torch.nan]])}, DELTA, "w has entries that are NaN or infinite"),
    ({"w": torch.tensor([[-torch.inf]])}, DELTA, "w has entries that are NaN or infinite"),
    ({"w": torch.ones(2, 2, dtype=torch.long)}, DELTA, "w is of int64, not of floating"),
    ({"w": torch.ones(2, 2, dtype=torch.bool)}, DELTA, "w is of bool, not of floating"),
    ({"w": torch.ones(2, 2, dtype=torch.cfloat)}, DELTA, "w is of complex64, not of floating"),
    ({"w": torch.ones(2, 2, dtype=torch.uint8)}, DELTA, "w is of uint8, not of floating"),
    ({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, DELTA, "w is of float8"),
    (MATRIX, PATCH, "its parts cannot be read"),
    (MATRIX, PATCH | {"parts": "[]"}, "its parts cannot be read"),
    (MATRIX, PATCH | {"parts": '{"m": {"kind": "beside"}}'}, "its parts cannot be read"),
    (MATRIX, PATCH | {"parts": "{}"}, "1 of its tensors belong to no part"),
    (MATRIX, PATCH | {"parts": '{"m": 3}'}, "its parts cannot be read"),
    (MATRIX, PATCH | {"parts": BOOK}, "its parts cannot be read"),
    (KEYS | {"m/radii": torch.ones(1)}, PATCH | {"parts": BOOK.replace("codebook", "os.system")},
     "its parts cannot be read"),
    (KEYS | {"m/radii": torch.ones(1)}, PATCH | {"parts": BOOK}, None),
    (MATRIX, DELTA, None),
]


@pytest.mark.parametrize("number", range(len(DELTAS)))
def test_files_of_edits(tmp_path, number):
    tensors, metadata, words = DELTAS[number]
    path = tmp_path / "edit.safetensors"
    save_file(tensors, path, metadata)
    if words is None:
        assert delta.load(path).label == str(path)
        return
    with pytest.raises(ValueError, match=words) as error:
        delta.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_codebook_fits_no_map_that_is_not_a_matrix(whole, tmp_path):
    tensors = {f"model.norm/{name}": torch.ones(1, 32) for name in ("keys", "values")}
    parts = BOOK.replace('"m"', '"model.norm"')
    save_file(tensors | {"model.norm/radii": torch.ones(1)}, tmp_path / "edit.safetensors",
              PATCH | {"parts": parts})
    patch = delta.load(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="edit.safetensors: model.norm has other widths"):
        patch.check(models.load(whole)[0])


# Texts and records ----------------------------------------------------------------------------

BASE = {"prompt": "{} was built in", "subject": "Sue Oakes", "target_new": "Rome",
        "target_true": "Oslo"}
LISTS = {"paraphrase_prompts": "paraphrases", "neighborhood_prompts": "neighbours",
         "attribute_prompts": "attributes", "generation_prompts": "generation"}
ENDS = (" ", "\t", "\u00a0", "\u200b", "\ufeff", "\u2060", "\u3000", " \u200d", "\r\n ", "\u202f")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("field", BASE)
def test_blanks_at_the_ends_of_texts_change_nothing(field, end):
    plain = fact(BASE)
    begun = fact(BASE | {field: end + BASE[field]})
    assert begun == plain
    ended = fact(BASE | {field: BASE[field] + end})
    lines = "\n" * (field == "prompt" and "\n" in end)     # an answer may stand on its own line
    assert ended == dataclasses.replace(plain, **{field: BASE[field] + lines})


@pytest.mark.parametrize("name", LISTS)
def test_so_in_lists_of_texts(name):
    read = fact(BASE | {name: ["\ufeff Ann was built in \u00a0"]})
    assert getattr(read, LISTS[name]) == ("Ann was built in",)
    assert fact(BASE | {name: None}) == fact(BASE)
    for text in ("", " ", "Ann \0", "Ann \ud83d", "Ann \x1b[2J", "x" * 100_001):
        with pytest.raises(ValueError, match="record 7: " + LISTS[name]):
            fact(BASE | {name: [text]}, 7)
    for value in ("Ann", [3], [None], {"a": 1}, [["Ann"]], 5):
        with pytest.raises(ValueError, match="record 7: " + name):
            fact(BASE | {name: value}, 7)


PO = "record 7: portability"
RECORDS = [     # (change of the base record, words of the error, or {field: value} of the Fact)
    ({"subject": "Sue \ud83d Oakes"}, "record 7: subject has half a surrogate pair"),
    ({"target_new": "Ro\udc00me"}, "record 7: target_new has half a surrogate pair"),
    ({"prompt": "{} was \0 in"}, "record 7: prompt has a control character"),
    ({"target_true": "Os\x7flo"}, "record 7: target_true has a control character"),
    ({"subject": "x" * 10 ** 7}, "record 7: subject has 10,000,000 characters"),
    ({"prompt": "{}" + "x" * 10 ** 7}, "record 7: prompt has 10,000,002 characters"),
    ({"subject": "{}"}, "record 7: the subject '{}' contains {}"),
    ({"subject": "a {} b"}, "record 7: the subject .* contains {}"),
    ({"subject": "\u200b\u00a0"}, "record 7: the subject is empty"),
    ({"target_new": "\ufeff"}, "record 7: target_new is empty"),
    ({"subject": "Sue\u00a0Oakes"}, {"subject": "Sue Oakes"}),
    ({"subject": "Sue\u200b Oakes"}, {"subject": "Sue Oakes"}),
    ({"neighborhood_prompts": ["{} was built in"]}, "record 7: neighbours: a full prompt"),
    ({"attribute_prompts": ["{} was built in"]}, "record 7: attributes: a full prompt"),
    ({"target_new": "São", "target_true": "Sa\u0303o"}, "record 7: target_new equals target_true"),
    ({"target_true": None, "case_id": None, "portability": None},
     {"target_true": "", "case_id": 7}),
    ({"target_new": None}, "record 7: no target_new"),
    ({"target_new": ""}, "record 7: target_new is empty"),
    ({"subject": 5}, "record 7: subject is not a text"),
    ({"prompt": "Sue Oakes was built in"}, "record 7: .*must mark the subject"),
    ({"prompt": "It was built in"}, "record 7: .*does not contain the subject"),
    ({"prompt": "{} and {}"}, "record 7: .*exactly one"),
    ({"subject": None, "target_new": None}, "record 7: no subject, target_new"),
    ({"target_new": {"str": ["Rome"]}}, "record 7: target_new is not a text"),
    ({"target_true": {"id": "Q1"}}, {"target_true": ""}),
    ({"case_id": [1]}, "record 7: case_id must be a number or a text"),
    ({"case_id": {"a": 1}}, "record 7: case_id must be"), ({"case_id": True}, "record 7: case_id"),
    ({"case_id": 1.5}, "record 7: case_id must be"), ({"case_id": " "}, "record 7: case_id must"),
    ({"case_id": " a "}, {"case_id": "a"}),
    ({"portability": ["x"]}, f"{PO} is not an object"), ({"portability": 5}, f"{PO} is not an"),
    ({"portability": "x"}, f"{PO} is not an object"), ({"portability": {}}, {"portability": ()}),
    ({"portability": {"A": "x"}}, f"{PO}: A is not a list"),
    ({"portability": {"A": 3}}, f"{PO}: A is not a list"),
    ({"portability": {"A": ["x"]}}, f"{PO}: A: a question needs a prompt"),
    ({"portability": {"A": [[]]}}, f"{PO}: A: a question needs a prompt"),
    ({"portability": {"A": [{"ground_truth": "y"}]}}, f"{PO}: A: a question needs a prompt"),
    ({"portability": {"A": [{"prompt": 5, "ground_truth": "y"}]}}, f"{PO}: A: a question needs"),
    ({"portability": {"A": [{"prompt": "q"}]}}, f"{PO}: A: a question without ground_truth"),
    ({"portability": {"A": [{"prompt": "q", "ground_truth": [5]}]}}, f"{PO}: A: ground_truth"),
    ({"portability": {"A": [{"prompt": "q", "ground_truth": 5}]}}, f"{PO}: A: ground_truth"),
    ({"portability": {"A": [{"prompt": "q", "ground_truth": [None]}]}}, f"{PO}: A: ground_truth"),
    ({"portability": {"A": [{"prompt": "q", "ground_truth": [[["y"]]]}]}}, f"{PO}: A: ground_trut"),
    ({"portability": {"A": [{"prompt": "q ", "ground_truth": [["y ", "z"]]}], "B": None}},
     {"portability": (("A", "q", ("y", "z")),)}),
    ({"portability": {"New Question": "q", "New Answer": "y"}},
     {"portability": (("Reasoning", "q", ("y",)),)}),
    ({"prompt": "Sue Oakes, as Sue Oakesley knew, was built in", "rephrase_prompt": "She is in",
      "target_true": None, "ground_truth": "Oslo", "locality_prompt": "Ann was built in",
      "locality_ground_truth": "Oslo"},
     {"prompt": "{}, as Sue Oakesley knew, was built in", "paraphrases": ("She is in",),
      "target_true": "Oslo", "neighbours": ("Ann was built in",)}),
    ({"locality_prompt": "Ann is in", "locality_ground_truth": "Bern"}, "record 7: locality_gr"),
    ({"locality_prompt": "Ann is in"}, "record 7: locality_ground_truth"),
    ({"rephrase_prompt": 5}, "record 7: rephrase_prompt is not a list of texts"),
    ({"rephrase_prompt": {"a": "b"}}, "record 7: rephrase_prompt is not a list of texts"),
    ({"rephrase_prompt": [5]}, "record 7: rephrase_prompt is not a list of texts"),
    ({"requested_rewrite": None}, {"subject": "Sue Oakes"}),
    ({"requested_rewrite": [BASE]}, "record 7: requested_rewrite is not an object"),
]


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_records(number):
    change, wanted = RECORDS[number]
    if isinstance(wanted, dict):
        read = fact(BASE | change, 7)
        assert {name: getattr(read, name) for name in wanted} == wanted
        return
    with pytest.raises(ValueError, match=wanted) as error:
        fact(BASE | change, 7)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


LINES = "\n".join(json.dumps(BASE | {"case_id": i}) for i in range(2))
TWO = json.dumps([BASE, BASE])
FILES = [       # (bytes, number of facts or words of the error)
    (TWO.encode("utf-8-sig"), 2), (TWO.encode("utf-16"), 2), (TWO.encode("utf-32"), 2),
    (LINES.encode(), 2), (LINES.encode("utf-8-sig") + b"\n\n", 2),
    (TWO.encode("utf-16-le"), "null bytes"), (b"[\xff]", "not a text in UTF-8"),
    (b"[" * 10 ** 5, "not valid JSON"), (b"", "not valid JSON"), (b'{"a": 1', "not valid JSON"),
    (b"[1" + b"0" * 10 ** 5 + b"]", "not valid JSON"), (LINES.encode() + b"\n{", "not valid JSON"),
    (b'[{"subject": "a", "subject": "b"}]', "'subject' stands twice in one object"),
    (json.dumps([BASE | {"case_id": 1}, BASE | {"case_id": "1"}]).encode(), "case_id occurs twice"),
    (b"{}", "non-empty list"), (b"[[]]", "record 0: expected an object"),
]


@pytest.mark.parametrize("number", range(len(FILES)))
def test_files_of_facts(tmp_path, number):
    content, wanted = FILES[number]
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    if isinstance(wanted, int):
        assert len(read_facts(path)) == wanted
        return
    with pytest.raises(ValueError, match=f"facts.json: .*{wanted}"):
        read_facts(path)


def test_a_byte_order_mark_is_no_part_of_a_text_file(tmp_path):
    for coding in ("utf-8-sig", "utf-16"):
        (tmp_path / "texts.txt").write_text("Orla runs.\nSue reads.", encoding=coding)
        assert read_lines(tmp_path / "texts.txt") == ["Orla runs.", "Sue reads."]


@pytest.mark.parametrize("prompt, answer, between", [
    ("Orla is in", "Rome", " "), ("Orla is in\n", "Rome", ""), ("Q: Orla?\n\n", "Rome", ""),
    ("user<|im_end|>\n<|im_start|>", "Rome", ""), ("Orla (", "Rome", ""), ("Orla, “", "Rome", ""),
    ("中国的首都是", "京都", ""), ("日本の首都は", "Rome", ""), ("The capital, ", "Rome", ""),
    ("Where is Orla?", "Rome", " "), ("Die Straße von Orla heißt", "Ödweg", " "),
])
def test_prompt_and_answer_are_the_joined_text(prompt, answer, between):
    tok = chat_tokenizer()
    ((begin, end),) = tokens.encode_pairs(tok, [(prompt, answer)])
    assert begin + end == tok(prompt + between + answer)["input_ids"]
    assert tok.decode(end).strip() == answer
    assert tok.decode(begin) == prompt.removesuffix(" ")


def test_a_token_across_prompt_and_answer_leaves_both_as_they_are():
    raw = Tokenizer(tokenizer_models.BPE())
    raw.decoder = decoders.Fuse()
    raw.train_from_iterator(["是京是京都", "是京"], trainers.BpeTrainer(
        vocab_size=9, show_progress=False, initial_alphabet=["\n"]))
    tok = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert len(tok("是京")["input_ids"]) == 1
    ((begin, end),) = tokens.encode_pairs(tok, [("都是", "京都")])
    assert tok.decode(begin) == "都是" and tok.decode(end) == "京都"


@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.NFKC()])
def test_a_normalising_tokenizer_takes_composed_and_decomposed_letters(form):
    tok = byte_tokenizer()
    tok.backend_tokenizer.normalizer = form
    composed, decomposed = (tokens.encode_pairs(tok, [("Orla is in", text)])[0][1]
                            for text in ("São Tomé", "Sa\u0303o Tome\u0301"))
    assert composed == decomposed
    assert metrics.answers("São Tomé.", "Sa\u0303o Tome\u0301")
    _, first, last = tokens.subject_span(tok, "In {} is", "Sa\u0303o")
    assert tok.decode(tok("In São is")["input_ids"][first:last + 1]).strip() == "São"


@pytest.mark.parametrize("field", ["target_new", "target_true", "subject"])
@pytest.mark.parametrize("text", ["<|im_end|>", "a <|endoftext|>"])
def test_control_tokens_are_refused(field, text):
    asked = [fact(BASE | {field: text}, 7)]
    with pytest.raises(ValueError, match="record 7: .*control token"):
        check_prompts(chat_tokenizer(), asked, 1000)


def test_far_too_long_texts_are_refused_before_they_are_tokenised():
    asked = [fact(BASE | {"subject": "ab " * 8000}, 7)]
    with pytest.raises(ValueError, match="record 7: a text of 2.,... characters"):
        check_prompts(chat_tokenizer(), asked, 64)


@pytest.mark.parametrize("prompt, subject, wanted", [
    ("Rome is home to the Romeo Club of", "Rome", "{} is home to the Romeo Club of"),
    ("In Romeo's town, Rome's river is", "Rome", "In Romeo's town, {}'s river is"),
    ("Romeo is", "Rome", ""), ("京都の駅は", "京都", "{}の駅は"), ("U.S. law", "U.S.", "{} law"),
    ("C++ and C are", "C", "C++ and {} are"), ("Rome", "", ""),
])
def test_subjects_are_marked_as_whole_words(prompt, subject, wanted):
    assert marked(prompt, subject) == wanted


def test_locality_in_mends_layout_is_one_question(tmp_path):
    row = {"subject": "Orla", "prompt": "Orla is in", "target_new": "Rome",
           "locality_prompt": "Ann is in ", "locality_ground_truth": "Bern"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (record,) = records.read_records(tmp_path / "rows.json", "counterfact")
    (ask,) = record.locality
    assert (ask.prompt, ask.answers) == ("Ann is in", ("Bern",))


# Cases that are kept outside: {name: field of the Fact, and its value}; the others are refused.
SHARED = Path(__file__).parents[2] / "shared" / "cases" / "records.json"
READ = {"prompt-trailing-blank": {"prompt": "{} plays the"}, "null-fields": {"target_true": ""},
        "decomposed-accents": {"case_id": 3}, "no-blank-before-answer": {"subject": "France"},
        "substring-subject": None, "control-token-as-target": {"target_new": "<|im_end|>"}}


@pytest.mark.skipif(not SHARED.is_file(), reason="the cases are not here")
def test_shared_records():
    for case in json.loads(SHARED.read_text()):
        wanted = READ.get(case["name"])
        if wanted is None:
            with pytest.raises(ValueError, match="record 3: "):
                fact(case["input"], 3)
        else:
            read = fact(case["input"], 3)
            assert {name: getattr(read, name) for name in wanted} == wanted


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
