"""What holds for all editors: one signature, undo, files, errors that name records."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from conftest import make
from editor_cases import CASES, CONTEXTS, prepared_case, shuffled, tensors_of
from oracle import apart

from editcore import editors
from editcore.delta import Delta, Patch, load
from editcore.editors import EDITORS, EditorInputs, configure, settings
from editcore.hooks import run
from editcore.model import content_hash
from editcore.model import load as load_model

FAMILIES = ["gpt2", "llama", "gptj", "gpt_neox", "mistral", "qwen2", "qwen3"]


def state_of(model):
    """All that an edit must leave as it was."""
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks))
             for module in model.modules()]
    gradients = [(weight.requires_grad, weight.grad is None) for weight in model.parameters()]
    return content_hash(model), hooks, gradients, [type(module) for module in model.modules()]


def distance(a, b):
    """Largest relative difference of two edits' tensors."""
    a = tensors_of(a)
    b = tensors_of(b)
    assert a.keys() == b.keys()
    return max(apart(a[name], b[name]) if b[name].any() else a[name].abs().max().item()
               for name in b)


def logits_of(model):
    return run(model, input_ids=torch.arange(5, 12)[None]).logits


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", EDITORS)
def test_an_edit_works_and_is_undone_bit_for_bit(name, kind, gpt2, llama, facts, tmp_path):
    tok = (llama if kind in ("llama", "mistral") else gpt2)[1]
    model = make(kind, len(tok))
    before = state_of(model)
    logits = logits_of(model)
    config, prepared = prepared_case(name, model, tok, facts)
    edit = EDITORS[name].edit(model, tok, facts[:3], config, prepared)
    assert isinstance(edit, Patch if EDITORS[name].makes_patch else Delta)
    assert edit.norm() > 0 and edit.is_finite() and state_of(model) == before
    with edit.applied(model):
        edited = logits_of(model)
        assert (content_hash(model) == before[0]) == EDITORS[name].makes_patch
    if name != "grace":     # its codebook answers the edited prompts only
        assert not torch.equal(edited, logits)
    assert state_of(model) == before and torch.equal(logits_of(model), logits)
    if kind == "gpt2":
        edit.save(tmp_path / "edit.safetensors")
        again = load(tmp_path / "edit.safetensors")
        assert distance(again, edit) == 0 and again.info == json.loads(json.dumps(edit.info))


@pytest.mark.parametrize("name", EDITORS)
def test_each_fact_alone_equals_an_edit_of_it(name, gpt2, facts):
    model, tok = gpt2
    config, prepared = prepared_case(name, model, tok, facts)
    together = EDITORS[name].edit_each(model, tok, facts[:4], config, prepared)
    for fact, edit in zip(facts, together):
        alone = EDITORS[name].edit(model, tok, [fact], config, prepared)
        assert distance(edit, alone) < 1e-4


@pytest.mark.parametrize("name", [name for name in EDITORS if name != "random"])
def test_groups_of_edited_models_equal_separate_edits(name, gpt2, facts):
    model, tok = gpt2
    editor = EDITORS[name]
    config, prepared = prepared_case(name, model, tok, facts)
    current = editor.edit_each(model, tok, facts[:2], config, prepared)
    groups = [facts[2:4], facts[4:5]]
    found = editor.edit_groups(model, tok, groups, config, prepared=[prepared] * 2, current=current)
    for edit, group, carried in zip(found, groups, current, strict=True):
        with carried.applied(model):
            alone = editor.edit(model, tok, group, config, prepared)
        assert distance(edit, alone) < (5e-3 if name == "rect" else 2e-4)
        fresh = editor.edit(model, tok, group, config, prepared)
        if not editor.makes_patch:
            assert distance(alone, fresh) > 1e-8, "the edit sees what the model carries"


@pytest.mark.parametrize("name", EDITORS)
def test_half_precision_models_are_edited_in_float32(name, gpt2, facts):
    tok = gpt2[1]
    model = make("gpt2", len(tok), dtype=torch.bfloat16)
    config, prepared = prepared_case(name, model, tok, facts)
    edit = EDITORS[name].edit(model, tok, facts[:2], config, prepared)
    assert edit.is_finite()
    assert all(value.dtype == torch.float32 for value in tensors_of(edit).values())
    with edit.applied(model):
        assert logits_of(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", EDITORS)
def test_a_fact_that_is_too_long_is_named(name, gpt2, facts):
    model, tok = gpt2
    before = content_hash(model)
    config, prepared = prepared_case(name, model, tok, facts)
    long = replace(facts[1], prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 1: .* tokens, but the model takes at most 64"):
        EDITORS[name].edit(model, tok, [facts[0], long], config, prepared)
    assert content_hash(model) == before


@pytest.mark.parametrize("name", [name for name in EDITORS if "lr" in vars(EDITORS[name].config)])
def test_a_broken_loss_names_record_and_step(name, gpt2, facts):
    model, tok = gpt2
    config, prepared = prepared_case(name, model, tok, facts)
    with pytest.raises(ValueError, match="record 3: the loss is (nan|not finite) at step 2"):
        EDITORS[name].edit(model, tok, facts[3:4], replace(config, lr=float("nan")), prepared)


@pytest.mark.parametrize("name", EDITORS)
def test_settings_are_frozen_dataclasses_and_published_ones_fit(name):
    editor = EDITORS[name]
    fields = dataclasses.fields(editor.config)
    assert name in CASES and editor.config.__dataclass_params__.frozen
    for model, values in editor.paper.items():
        assert configure(name, {}, model) == editor.config(**editor.variant | values)
    types = {field.name: field.type for field in fields}
    defaults = {field.name: field.default for field in fields
                if field.default is not dataclasses.MISSING}
    for values in (defaults, editor.variant, *editor.paper.values()):
        for key, value in values.items():
            assert settings.read(value, types[key], key) == value


@pytest.mark.parametrize("name", EDITORS)
def test_a_layer_that_the_model_lacks_is_named(name, gpt2, facts):
    layer = {"layer": 9} if "layer" in {f.name for f in dataclasses.fields(EDITORS[name].config)} \
        else {"layers": 9}
    with pytest.raises(ValueError, match="layer 9: the model has layers 0 to 3"):
        prepared_case(name, *gpt2, facts, **layer)


def test_published_settings_are_found_by_name_or_folder():
    assert configure("rome", {}, "openai-community/gpt2-xl").layer == 17
    assert configure("rome", {}, "EleutherAI/gpt-j-6B").layer == 5
    assert configure("rome", {}, "meta-llama/Llama-2-7b-hf").layer == 5
    assert configure("memit", {}, "gpt2-xl").lambda_ == 20000
    pocket = configure("memit", {}, "pocket")
    assert configure("memit", {}, "/x/data/pocket/model") == pocket and pocket.layers == (0, 1)


def test_settings_override_and_are_read():
    changes = {"layers": "3, 5", "lambda": "1e2", "steps": "7", "clamp": 2}
    config = configure("memit", changes, "gpt2-xl")
    assert (config.layers, config.lambda_, config.steps, config.clamp) == ((3, 5), 100.0, 7, 2.0)
    assert configure("memit", {"layers": 4, "lambda_": 1}).layers == (4,)
    assert configure("rome", {"layer": "2", "convention": "r-rome"}).convention == "r-rome"
    assert configure("ft", {"epsilon": 1, "last_position": "true"}).last_position is True


@pytest.mark.parametrize("name, changes, words", [
    ("roam", {}, "unknown editor 'roam': choose one of rome, r-rome, .*, grace, calinet"),
    ("rome", {"layers": 1}, "rome has no setting 'layers'; it has layer, steps"),
    ("rome", {"layer": "one"}, "rome: layer is 'one', but must be a whole number from 0 to 999"),
    ("rome", {"lr": "fast"}, "rome: lr is 'fast', but must be a number above 0, at most 1000"),
    ("rome", {"kl_prompt": 3}, "rome: kl_prompt is 3, but must be a text with \"{}\""),
    ("rome", {"layer": 1, "convention": "x"}, "convention is 'x', but must be one of rome, r-rome"),
    ("ft", {"epsilon": 1, "last_position": "maybe"}, "is 'maybe', but must be bool"),
    ("memit", {"layers": "0,a"}, "layers is .*, but must be at least one whole number from 0 to"),
    ("memit", {"layers": "0"}, "nothing is published for model 'tiny'.*give lambda_"),
])
def test_bad_settings_are_named(name, changes, words):
    with pytest.raises(ValueError, match=words):
        configure(name, changes, "tiny")


NAN = float("nan")
WHOLE = (-1, "-3", "inf", NAN, 2.5, True, "many", 10**13)
REAL = (-1, "inf", NAN, 1e30, True, "much")
POSITIVE = (0, "-0.0", *REAL)
LAYERS = ((), "0,0", (2, 1), (True,), "0,inf", 1000, "a")
BAD = {     # setting -> values that are refused; a new setting fails the test until it has some
    **dict.fromkeys(("layer", "seed", "anchor", "early_stop", "n_tokens", "wordings", "rows"),
                    WHOLE),
    **dict.fromkeys(("steps", "rank", "depth", "hidden", "width", "inner", "slots", "length"),
                    (0, *WHOLE)),
    **dict.fromkeys(("stop_loss", "kl_factor", "weight_decay", "ridge", "null_space", "lambda_"),
                    REAL),
    **dict.fromkeys(("lr", "clamp", "epsilon", "radius", "scale"), POSITIVE),
    **dict.fromkeys(("convention", "kl_position", "direction", "part", "begin", "parts"),
                    ("x", "", 1)),
    **dict.fromkeys(("exact", "memory", "last_position"), ("maybe", 2, NAN)),
    "layers": LAYERS, "keep": (1.5, *POSITIVE), "prune": (0, 0.5, *REAL), "alpha": REAL[1:],
    "kl_prompt": ("no place for it", "", 3), "network": (3, True), "context_groups": ("x", 3),
    "norms": ("x", ((1, -1.0),), ((1, NAN),), (1,)),
}


@pytest.mark.parametrize("name", EDITORS)
def test_every_setting_has_a_range(name):
    for field in dataclasses.fields(EDITORS[name].config):
        for value in BAD[field.name]:
            with pytest.raises(ValueError, match=f"^{name}: {field.name} is .*, but must be ") as e:
                configure(name, {field.name: value}, "pocket")
            assert "\n" not in str(e.value)


@pytest.mark.parametrize("inputs, error, words", [
    ({}, ValueError, "give texts, or a file .*128 dimensions take some 20,000 tokens"),
    ({"moments": "nothing.safetensors"}, FileNotFoundError, "nothing.safetensors"),
    ({"contexts": ("A. {}",), "texts": ("Rome",)}, ValueError, "must be the plain prompt"),
    ({"texts": ("Rome is old.",)}, ValueError, "not positive definite: .* take more texts"),
])
def test_inputs_that_are_missing_or_bad(gpt2, inputs, error, words):
    inputs = EditorInputs(**{"contexts": CONTEXTS} | inputs)
    with pytest.raises(error, match=words):
        EDITORS["rome"].prepare(*gpt2, configure("rome", CASES["rome"]), inputs)


def test_edit_with_everything_at_its_default(place, facts, tmp_path):
    model, tok = load_model(place, "cpu")
    (place / "texts.txt").write_text("\n".join(shuffled()))
    delta = editors.edit(model, tok, facts[:1], "rome", layer=1, steps=3, cache=tmp_path)
    config, prepared = editors.prepare(model, tok, "rome", layer=1, steps=3, cache=tmp_path)
    assert prepared.contexts[0] == "{}" and len(prepared.contexts) == 21
    again = EDITORS["rome"].edit(model, tok, facts[:1], config, prepared)
    assert torch.equal(*(tensors_of(edit)["transformer.h.1.mlp.c_proj.weight"]
                         for edit in (delta, again)))
    assert len(list(tmp_path.glob("C-*"))) == len(list(tmp_path.glob("templates-*"))) == 1
    other = editors.edit(model, tok, facts[:1], layer=1, steps=3, contexts=CONTEXTS,
                         moments=prepared.moments, cache=tmp_path)
    assert distance(other, delta) > 1e-3
    nas = editors.edit(model, tok, facts[:2], "nas", layer=1, steps=3, cache=tmp_path)
    assert nas.info["value_norm"][0] == pytest.approx(nas.info["value_norm"][1])
    patch = editors.edit(model, tok, facts[:1], "grace", layer=2, part="mlp_in", steps=2)
    assert isinstance(patch, Patch)
    with pytest.raises(ValueError, match="nothing is published for model .*tiny.*; give layer"):
        editors.edit(model, tok, facts[:1])
