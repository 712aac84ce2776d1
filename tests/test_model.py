"""editcore.model: loading, layouts of every family, names, orientation, content hashes."""

import pytest
import torch
from conftest import byte_tokenizer, make

from editcore import model as models
from editcore.hooks import capture, run

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("kind", FAMILIES)
def test_layouts_name_the_parts(kind):
    model = make(kind, 40, layers=3)
    assert models.layout(model) is models.LAYOUTS[kind] and models.n_layers(model) == 3
    width, inner = model.config.hidden_size, models.module_of(model, "mlp_out", 1)
    m = inner.weight.shape[0] if models.is_input_first(inner) else inner.weight.shape[1]
    names = [models.name_of(model, part, 1) for part in ("mlp_in", "mlp_out", "mlp", "attn", "block")]
    with capture(model, names, "output", stop=False) as out, capture(model, names[1:2], "input", stop=False) as into:
        run(model, input_ids=torch.arange(5)[None])
    assert out[names[0]].shape == into[names[1]].shape == (1, 5, m)
    for name in names[1:]:
        assert out[name].shape == (1, 5, width)
    assert torch.equal(out[names[1]], out[names[2]])     # the MLP's output is that of its last linear map
    for part in (models.layout(model).embed, models.layout(model).norm):
        assert model.get_submodule(part).weight.shape[-1] == width
    name, weight = models.weight_of(model, "mlp_out", 1)
    assert model.get_parameter(name) is weight and models.max_length(model) == 64


def test_only_conv1d_is_input_first(gpt2, llama):
    assert models.is_input_first(models.module_of(gpt2[0], "mlp_out", 0))
    assert not models.is_input_first(models.module_of(llama[0], "mlp_out", 0))


def test_layers_are_range_checked(gpt2):
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"layer {layer}: the model has layers 0 to 3"):
            models.name_of(gpt2[0], "block", layer)


def test_load_gives_the_saved_model_in_the_wanted_type(gpt2, tmp_path):
    model, tok = gpt2
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again, tok2 = models.load(tmp_path, device="cpu", dtype=torch.float64)
    assert again.dtype == torch.float64 and not again.training
    assert not any(weight.requires_grad for weight in again.parameters())
    assert models.content_hash(again.float()) == models.content_hash(model)
    assert tok2("Rome is")["input_ids"] == tok("Rome is")["input_ids"]


def test_load_errors_name_the_folder(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}: not a model folder"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*cannot be loaded"):
        models.load(tmp_path)


def test_an_unknown_architecture_is_refused(gpt2):
    class Other:
        class config:
            model_type = "bert"
    with pytest.raises(ValueError, match="'bert' is not in LAYOUTS"):
        models.layout(Other)


def test_content_hash_sees_one_changed_weight_and_no_name(gpt2):
    model, _ = gpt2
    same, other = make("gpt2", len(byte_tokenizer())), make("gpt2", len(byte_tokenizer()), seed=1)
    assert models.content_hash(model) == models.content_hash(same) != models.content_hash(other)
    weight = models.weight_of(same, "mlp_out", 2)[1]
    weight[3, 4] += 1e-3
    assert models.content_hash(model) != models.content_hash(same)


def test_devices():
    assert models.default_device() in ("cpu", "cuda")
    models.synchronize("cpu")
    assert models.peak_memory("cpu") == 0 and models.batch_tokens("cpu") > 0
