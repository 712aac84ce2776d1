"""editcore.model: loading, layouts of every family, names, orientation, content hashes, devices."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make

from editcore import model as models
from editcore.hooks import capture, run


@pytest.mark.parametrize("kind", models.LAYOUTS)
def test_layouts_name_the_parts(kind):
    model = make(kind, 40, layers=3)
    layout = models.layout(model)
    assert layout is models.LAYOUTS[kind]
    assert models.n_layers(model) == 3 and models.max_length(model) == 64
    width = model.config.hidden_size
    m, d = models.in_out(models.module_of(model, "mlp_out", 1))
    assert d == width and models.in_out(models.module_of(model, "mlp_in", 1))[0] == d
    parts = ("mlp_in", "mlp_out", "mlp", "attn", "block")
    names = {part: models.name_of(model, part, 1) for part in parts}
    with capture(model, list(names.values()), "output", stop=False) as outputs, \
            capture(model, [names["mlp_out"]], "input", stop=False) as inputs:
        run(model, input_ids=torch.arange(5)[None])
    assert inputs[names["mlp_out"]].shape == (1, 5, m)
    fused = kind == "phi3"      # whose one map gives the gate too
    assert outputs[names["mlp_in"]].shape == (1, 5, m * (1 + fused))
    assert all(outputs[names[part]].shape == (1, 5, width) for part in parts[1:])
    assert torch.equal(outputs[names["mlp_out"]], outputs[names["mlp"]])
    assert bool(layout.mlp_gate) == hasattr(models.module_of(model, "mlp", 1), "gate_proj")
    for part in (layout.embed, layout.norm):
        assert model.get_submodule(part).weight.shape[-1] == width


def test_short_names():
    assert Path(models.resolve("pocket")) == Path(__file__).parents[1] / "data" / "pocket"
    assert models.resolve("gpt2-xl") == "gpt2-xl"
    assert models.short_name(models.resolve("pocket")) == "pocket"
    model, tok = models.load("pocket")
    assert models.n_layers(model) == 5 and tok("a")["input_ids"]
    assert not any(weight.data_ptr() % 64 for weight in model.parameters())


def test_load_gives_the_saved_model_in_the_wanted_type(gpt2, tmp_path, capsys):
    model, tok = gpt2
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    capsys.readouterr()
    again, tok2 = models.load(tmp_path, device="cpu", dtype=torch.float64)
    assert capsys.readouterr() == ("", "")      # no bar of weight files
    assert again.dtype == torch.float64 and not again.training
    assert not any(weight.requires_grad for weight in again.parameters())
    assert models.content_hash(again.float()) == models.content_hash(model)
    assert tok2("Rome is")["input_ids"] == tok("Rome is")["input_ids"]


def test_content_hash_sees_one_changed_weight_and_no_name(gpt2):
    vocabulary = len(byte_tokenizer())
    before = models.content_hash(gpt2[0])
    same = make("gpt2", vocabulary)
    assert before == models.content_hash(same)
    assert before != models.content_hash(make("gpt2", vocabulary, seed=1))
    models.module_of(same, "mlp_out", 2).weight[3, 4] += 1e-3
    assert before != models.content_hash(same)


def test_devices():
    assert models.default_device() in ("cpu", "cuda")
    models.synchronize("cpu")
    assert models.peak_memory("cpu") == 0 and models.batch_tokens("cpu") > 0


def test_a_user_without_a_name_may_take_a_gpu(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: {}["uid not found"])
    with models.free_gpu():
        assert models.default_device() in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["hpu", "meta", "cpu:x", "gpu", "cuda:99", " cpu"])
def test_devices_that_are_not_here_are_one_line(name):
    with pytest.raises(ValueError, match="cannot be used here") as error:
        models.check_device(name)
    assert "\n" not in str(error.value)
    models.check_device("cpu")
    models.check_device("")
