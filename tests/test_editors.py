"""editcore.editors: one seam for all editors, settings read and checked, the model never changed."""

import random
from dataclasses import fields, is_dataclass

import pytest
import torch
from conftest import CITIES, SUBJECTS, corpus, make

from editcore.delta import Delta, Patch
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.facts import Fact
from editcore.hooks import run
from editcore.model import content_hash, max_length

ROME, MEMIT = {"layer": 1, "steps": 3}, {"layers": "0,1", "lambda": 10, "steps": 3}
SMALL = {"rome": ROME, "r-rome": ROME, "p-rome": ROME, "nas": ROME | {"anchor": 2}, "memit": MEMIT, "memit-past": MEMIT,
         "emmet": MEMIT | {"layers": 1}, "encore": MEMIT | {"ridge": 0.1, "early_stop": 2},
         "alphaedit": MEMIT | {"null_space": 0.2}, "rect": MEMIT, "prune": MEMIT, "ft": {"epsilon": 1e-2, "steps": 2},
         "ke": {"layers": "2,3", "network": "untrained", "hidden": 8, "width": 8, "inner": 8},
         "mend": {"network": "untrained", "rank": 8, "alpha": 0.01, "layers": "-2,-1"},
         "random": {"layer": 1, "norms": tuple((case, 1.0) for case in range(12))},
         "grace": {"layer": 1, "part": "mlp_in", "steps": 2}, "calinet": {"layers": 3, "slots": 4, "steps": 2}}
PATCHES = [name for name, editor in EDITORS.items() if editor.makes_patch]
DELTAS = [name for name in EDITORS if name not in PATCHES]
CONTEXTS = ("{}", "The first. {}")
FACTS = [Fact(case_id=100 + i, subject=subject, prompt="The home of {} is",
              target_new=city) for i, (subject, city) in enumerate(zip(SUBJECTS, CITIES))]


def shuffled(count=300):
    """Texts of words in random order, so that keys fill all dimensions."""
    words, draw = " ".join(corpus()).split(), random.Random(0)
    return tuple(" ".join(draw.choices(words, k=12)) for _ in range(count))


def prepared(name, model, tok, config):
    given = EditorInputs(texts=shuffled(), contexts=CONTEXTS, pilot=tuple(FACTS[:2]))
    return EDITORS[name].prepare(model, tok, config, given)


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gpt_neox", "mistral", "qwen2", "qwen3"])
def test_every_editor_edits_every_family_and_leaves_it_as_it_was(name, kind, gpt2, llama, facts):
    tok = (llama if kind in ("llama", "mistral") else gpt2)[1]
    model, config = make(kind, len(tok)), configure(name, SMALL[name])
    before, needed = content_hash(model), [weight.requires_grad for weight in model.parameters()]
    given = prepared(name, model, tok, config)
    total = EDITORS[name].edit(model, tok, facts[:3], config, given)
    deltas = EDITORS[name].edit_each(model, tok, facts[:3], config, given)
    assert isinstance(total, Delta) and total.norm() > 0 and total.is_finite() and len(deltas) == 3
    assert content_hash(model) == before
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with total.applied(model):
        assert content_hash(model) != before
    assert content_hash(model) == before


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gpt_neox", "mistral", "qwen2", "qwen3"])
def test_every_patch_works_on_every_family_and_touches_no_weight(name, kind, gpt2, llama, facts):
    tok = (llama if kind in ("llama", "mistral") else gpt2)[1]
    model, config, editor = make(kind, len(tok)), configure(name, SMALL[name]), EDITORS[name]
    before, needed = content_hash(model), [weight.requires_grad for weight in model.parameters()]
    ids = torch.tensor([tok(facts[0].text)["input_ids"]])
    plain, given = run(model, input_ids=ids).logits, editor.prepare(model, tok, config, EditorInputs())
    total = editor.edit(model, tok, facts[:3], config, given)
    patches = editor.edit_each(model, tok, facts[:3], config, given)
    assert isinstance(total, Patch) and total.norm() > 0 and total.is_finite() and len(patches) == 3
    with total.applied(model):
        assert not torch.equal(run(model, input_ids=ids).logits, plain) and content_hash(model) == before
    with (Patch({}) + patches[0] + patches[1]).applied(model):
        assert not torch.equal(run(model, input_ids=ids).logits, plain)
    assert torch.equal(run(model, input_ids=ids).logits, plain) and content_hash(model) == before
    assert [weight.requires_grad for weight in model.parameters()] == needed
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", DELTAS)
def test_edits_add_up_on_the_edited_model(name, gpt2, facts):
    model, tok = gpt2
    config = configure(name, SMALL[name])
    given = prepared(name, model, tok, config)
    total, again = Delta({}), Delta({})
    for fact in facts[:2]:
        with total.applied(model):
            one = EDITORS[name].edit(model, tok, [fact], config, given)
        again = EDITORS[name].edit(model, tok, [fact], config, given)
        total = total + one
    # the second edit saw the first; the control is told its norm
    assert abs(one.norm() / again.norm() - 1) > 1e-9 or name == "random"


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_half_precision_models_are_edited_in_float32(name, gpt2, facts):
    tok, config = gpt2[1], configure(name, SMALL[name])
    model = make("gpt2", len(tok), dtype=torch.bfloat16)
    delta = EDITORS[name].edit(model, tok, facts[:2], config, prepared(name, model, tok, config))
    parts = [part for change in delta.changes.values() for part in (change.left, change.right)]
    assert delta.is_finite() and all(part.dtype == torch.float32 for part in parts)


@pytest.mark.parametrize("name", [*PATCHES, "ke"])
def test_half_precision_models_get_additions_in_float32(name, gpt2, facts):
    model, tok, editor = make("gpt2", len(gpt2[1]), dtype=torch.bfloat16), gpt2[1], EDITORS[name]
    config = configure(name, SMALL[name])
    made = editor.edit(model, tok, facts[:2], config, editor.prepare(model, tok, config))
    tensors = [one for part in (made.parts if name in PATCHES else made.changes).values()
               for one in vars(part).values() if torch.is_tensor(one)]
    assert made.is_finite() and len(tensors) > 1 and all(one.dtype == torch.float32 for one in tensors)
    with made.applied(model):
        assert run(model, input_ids=torch.arange(5, 9)[None]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", EDITORS)
def test_settings_are_frozen_dataclasses(name):
    editor = EDITORS[name]
    assert is_dataclass(editor.config) and editor.config.__dataclass_params__.frozen
    for model, values in editor.paper.items():
        assert set(values) <= {field.name for field in fields(editor.config)}
        assert configure(name, {}, model) == editor.config(**editor.variant | values)


def test_published_settings_are_found_by_name_or_folder():
    assert configure("rome", {}, "openai-community/gpt2-xl").layer == 17
    assert configure("rome", {}, "EleutherAI/gpt-j-6B").layer == 5
    assert configure("rome", {}, "meta-llama/Llama-2-7b-hf").layer == 5
    assert configure("rome", {}, "gpt2-medium").clamp == 3
    assert configure("memit", {}, "gpt2-xl").lambda_ == 20000 and configure("memit", {}, "gpt-j-6b").steps == 25
    assert configure("memit", {}, "/x/data/pocket/model").layers == configure("memit", {}, "pocket").layers
    assert configure("ft", {}, "gpt2-xl").epsilon == 5e-4


def test_settings_override_and_are_read():
    config = configure("memit", {"layers": "3, 5", "lambda": "1e2", "steps": "7", "clamp": 2}, "gpt2-xl")
    assert (config.layers, config.lambda_, config.steps, config.clamp) == ((3, 5), 100.0, 7, 2.0)
    assert configure("memit", {"layers": 4, "lambda_": 1}).layers == (4,)
    assert configure("rome", {"layer": "2", "convention": "r-rome"}).convention == "r-rome"
    assert configure("ft", {"epsilon": 1, "last_position": "true"}).last_position is True


@pytest.mark.parametrize("name, settings, words", [
    ("roam", {}, "unknown editor 'roam': choose one of rome, r-rome, .*, ft, random, grace, calinet"),
    ("rome", {"layers": 1}, "rome has no setting 'layers'; it has layer, steps"),
    ("rome", {"layer": "one"}, "rome: layer is 'one', but must be int"),
    ("rome", {"layer": 1.5}, "rome: layer is 1.5, but must be int"),
    ("rome", {"layer": 1, "lr": "fast"}, "rome: lr is 'fast', but must be float"),
    ("rome", {"layer": 1, "convention": "x"}, "convention is 'x', but must be one of rome, r-rome, p-rome"),
    ("ft", {"epsilon": 1, "last_position": "maybe"}, "last_position is 'maybe', but must be bool"),
    ("memit", {"layers": "0,a", "lambda": 1}, "layers is '0,a', but must be tuple"),
    ("memit", {"layers": "0"}, "nothing is published for model 'tiny'.*give lambda_"),
    ("rome", {}, "nothing is published for model 'tiny'.*give layer"),
])
def test_bad_settings_are_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        configure(name, settings, "tiny")


def test_sources_that_are_missing_or_bad(gpt2, tmp_path):
    model, tok = gpt2
    config = configure("rome", SMALL["rome"])
    prepare = EDITORS["rome"].prepare
    with pytest.raises(ValueError, match="give texts to compute them from, or a statistics file"):
        prepare(model, tok, config, EditorInputs(contexts=CONTEXTS))
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        prepare(model, tok, config, EditorInputs(contexts=CONTEXTS, moments=tmp_path / "nothing.safetensors"))
    with pytest.raises(ValueError, match="must be the plain prompt"):
        prepare(model, tok, config, EditorInputs(contexts=("A. {}",), texts=tuple(corpus())))
    with pytest.raises(ValueError, match="not positive definite: .* take more texts"):
        prepare(model, tok, config, EditorInputs(contexts=CONTEXTS, texts=("Rome is old.",)))
    assert max_length(model) == 64


def test_statistics_are_kept_in_the_cache_folder(gpt2, tmp_path):
    model, tok = gpt2
    config = configure("memit", SMALL["memit"])
    given = EditorInputs(texts=shuffled(), contexts=CONTEXTS, cache=str(tmp_path))
    first = EDITORS["memit"].prepare(model, tok, config, given)
    assert len(list(tmp_path.glob("C-*.safetensors"))) == 2
    second = EDITORS["memit"].prepare(model, tok, config, given)
    assert all(torch.equal(first.moments.moments[name], second.moments.moments[name]) for name in first.moments.moments)
