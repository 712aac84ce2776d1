"""editcore.moments: a plain sum, an inverse, files that are met by content only."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make
from safetensors.torch import save_file

from editcore import cli, editors
from editcore import moments as module
from editcore.hooks import capture, run
from editcore.model import name_of
from editcore.moments import CountSettings, Moments, cached, load, second_moments, token_rows


def plain(model, rows, layer):
    """(Σ k kᵀ / count, count) in float64, a row at a time."""
    name = name_of(model, "mlp_out", layer)
    keys = []
    for row in rows:
        with capture(model, [name], "input") as inputs:
            run(model, input_ids=torch.tensor([row]))
        keys.append(inputs[name][0].double())
    keys = torch.cat(keys)
    return keys.T @ keys / len(keys), len(keys)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_layers_in_one_pass_equal_the_plain_sum(family, request, texts):
    model, tok = request.getfixturevalue(family)
    rows = [row[:20] for row in tok(texts)["input_ids"]]
    moments = second_moments(model, tok, texts, [0, 2], CountSettings(length=20, pack=False))
    for layer in (0, 2):
        expected, count = plain(model, rows, layer)
        moment = moments.moments[name_of(model, "mlp_out", layer)]
        assert moment.dtype == torch.float64 and moments.count == count
        assert ((moment - expected).norm() / expected.norm()).item() < 1e-6


def test_packed_rows_are_the_texts_end_to_end(gpt2, texts):
    model, tok = gpt2
    joined = [token for row in tok(texts)["input_ids"] for token in row]
    rows = token_rows(model, tok, texts, CountSettings(length=500))
    assert [token for row in rows for token in row] == joined
    assert {len(row) for row in rows[:-1]} == {64}      # the model takes no longer ones
    rows = token_rows(model, tok, texts, CountSettings(length=30, tokens=100))
    assert [token for row in rows for token in row] == joined[:100]
    assert max(map(len, rows)) == 30


def test_too_few_texts_are_errors(gpt2, texts):
    model, tok = gpt2
    with pytest.raises(ValueError, match="10000000 tokens wanted, but the texts have"):
        second_moments(model, tok, texts, [0], CountSettings(tokens=10_000_000))
    with pytest.raises(ValueError, match="no tokens"):
        second_moments(model, tok, [""], [0])
    few = second_moments(model, tok, texts[1:3], [0])
    words = rf"h.0.mlp.c_proj is not positive definite: {few.count} tokens for 128 dim"
    with pytest.raises(ValueError, match=words):
        few.solve(name_of(model, "mlp_out", 0), torch.ones(128))


def test_solve_is_the_inverse_and_its_factor_is_kept():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    moment = root @ root.T + torch.eye(40)
    keys = torch.randn(40, 3, generator=generator)
    moments = Moments({"a": moment}, 100)
    expected = torch.linalg.inv(moment) @ keys.double()
    torch.testing.assert_close(moments.solve("a", keys), expected, rtol=1e-9, atol=1e-12)
    factor = moments.factors["a"]
    column = moments.solve("a", keys[:, 0])
    torch.testing.assert_close(column, expected[:, 0], rtol=1e-9, atol=1e-12)
    assert moments.factors["a"] is factor
    with pytest.raises(ValueError, match="no second moment of b; there is one of a"):
        moments.solve("b", keys)


def test_files(tmp_path):
    path = tmp_path / "c.safetensors"
    moments = Moments({"x.y": torch.eye(3, dtype=torch.float64)}, 7)
    moments.save(path)
    again = load(path)
    assert again.count == 7 and torch.equal(again.moments["x.y"], moments.moments["x.y"])
    save_file({"C/a": torch.eye(2), "other": torch.ones(1)}, path)
    assert list(load(path).moments) == ["a"] and load(path).count == 0


@pytest.mark.parametrize("tensors, metadata, words", [
    ({"other": torch.ones(1)}, {}, "not a file of second moments, or damaged: no tensor C/"),
    ({"C/a": torch.ones(1)}, {"count": "many"}, "not a file of second moments, or damaged"),
    ({"C/a": torch.eye(2) * torch.nan}, {}, "C/a must be a square matrix of finite floats"),
    ({"C/a": torch.eye(2, dtype=torch.int64)}, {}, "C/a must be a square matrix of finite floats"),
    ({"C/a": torch.ones(2, 3)}, {}, "C/a must be a square matrix of finite floats"),
    ({"C/a": torch.ones(2)}, {}, "C/a must be a square matrix of finite floats"),
])
def test_damaged_files_are_named(tensors, metadata, words, tmp_path):
    save_file(tensors, tmp_path / "c.safetensors", metadata)
    with pytest.raises(ValueError, match=f"c.safetensors: {words}"):
        load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("other, words", [
    (lambda gpt2: gpt2, None),
    (lambda gpt2: (make("gpt2", 400, seed=1), gpt2[1]), "c.safetensors: .* another .*model_hash"),
    (lambda gpt2: (copy.deepcopy(gpt2[0]).bfloat16(), gpt2[1]), "another .*model_hash"),
    (lambda gpt2: (gpt2[0], byte_tokenizer(399)), "another .*tokenizer_hash"),
])
def test_moments_of_another_model_are_refused(gpt2, texts, tmp_path, other, words):
    path = tmp_path / "c.safetensors"
    counted = cached(*gpt2, texts, [0], tmp_path)
    counted.save(path)
    unnamed = Moments(counted.moments, counted.count)
    model, tok = other(gpt2)
    settings = {"layer": 0, "contexts": ("{}",), "cache": tmp_path}
    if words is None:
        _, prepared = editors.prepare(model, tok, moments=path, **settings)
        assert prepared.moments.count == counted.count
    else:
        for moments in (path, counted):
            with pytest.raises(ValueError, match=words.removeprefix("c.safetensors: .* ")):
                editors.prepare(model, tok, moments=moments, **settings)
    unnamed.save(path)      # as older files are
    editors.prepare(model, tok, moments=path, **settings)


def test_the_command_writes_a_file_that_edit_takes(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    words = ["moments", str(place), "--layers", "1,2", "-o", "c.safetensors"]
    assert cli.main(words) == 0
    assert "2 layers" in capsys.readouterr().out
    assert len(load("c.safetensors").moments) == 2
    assert set(load("c.safetensors").source) == {"model_hash", "tokenizer_hash"}
    Path("settings.json").write_text('{"rome": {"layer": 1, "steps": 2}}')
    monkeypatch.setattr(module, "second_moments", None)     # nothing is counted any more
    edit = ["edit", str(place), str(place / "facts.json"), "--editor", "rome", "--set",
            "@settings.json", "--stats", "c.safetensors", "-o", "d.safetensors"]
    assert cli.main(edit) == 0
    for bad, words in (("memit", "no settings of memit"), ("rome", "no such file")):
        edit[4] = bad
        edit[6] = "@settings.json" if bad == "memit" else "@none.json"
        assert cli.main(edit) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["moments", str(place), "--layers", "9", "-o", "e"]) == 2
    assert "layer 9: the model has layers 0 to 3" in capsys.readouterr().err


def test_the_cache_is_met_by_content(gpt2, texts, tmp_path, monkeypatch):
    model, tok = gpt2
    direct = second_moments(model, tok, texts, [0, 1])
    counted = []

    def count(model, tok, texts, layers, settings):
        counted.append(layers)
        return second_moments(model, tok, texts, layers, settings)

    monkeypatch.setattr(module, "second_moments", count)
    for layers in ([0, 1], [1, 0]):
        again = cached(model, tok, texts, layers, tmp_path)
        for name, moment in direct.moments.items():
            assert torch.equal(again.moments[name], moment)
    assert counted == [[0, 1]] and len(list(tmp_path.iterdir())) == 2
    changed = make("gpt2", len(tok))
    changed.transformer.h[0].ln_1.weight[0] += 0.01
    for case in ((changed, texts, CountSettings()), (model, texts, CountSettings(length=32)),
                 (model, texts[1:], CountSettings())):
        cached(case[0], tok, case[1], [0, 1], tmp_path, case[2])
    assert counted == [[0, 1]] * 4 and len(list(tmp_path.iterdir())) == 8
