"""editcore.stats: second moments equal a plain sum, solves equal an inverse, files are met by content only."""

import pytest
import torch
from conftest import make
from safetensors.torch import save_file

from editcore import moments as stats
from editcore.hooks import capture, run
from editcore.model import name_of
from editcore.moments import CountSettings, Moments, cached, second_moments


def plain(model, rows, layer):
    """Σ k kᵀ / count in float64, a row at a time."""
    name, total, count = name_of(model, "mlp_out", layer), 0, 0
    for row in rows:
        with capture(model, [name], "input") as kept:
            run(model, input_ids=torch.tensor([row]))
        keys = kept[name][0].double()
        total, count = total + keys.T @ keys, count + len(keys)
    return total / count, count


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_layers_in_one_pass_equal_the_plain_sum(family, request, texts):
    model, tok = request.getfixturevalue(family)
    rows = [row[:20] for row in tok(texts)["input_ids"]]
    found = second_moments(model, tok, texts, [0, 2], CountSettings(length=20, pack=False))
    for layer in (0, 2):
        expected, count = plain(model, rows, layer)
        moment = found.moments[name_of(model, "mlp_out", layer)]
        assert moment.dtype == torch.float64 and found.count == count
        assert ((moment - expected).norm() / expected.norm()).item() < 1e-6


def test_packed_rows_are_the_texts_end_to_end(gpt2, texts):
    model, tok = gpt2
    joined = [token for row in tok(texts)["input_ids"] for token in row]
    rows = stats.token_rows(model, tok, texts, CountSettings(length=500))
    assert [token for row in rows for token in row] == joined
    assert {len(row) for row in rows[:-1]} == {64}      # the model takes no longer ones
    some = stats.token_rows(model, tok, texts, CountSettings(length=30, tokens=100))
    assert [token for row in some for token in row] == joined[:100] and max(map(len, some)) == 30


def test_too_few_texts_are_errors(gpt2, texts):
    model, tok = gpt2
    with pytest.raises(ValueError, match="10000000 tokens wanted, but the texts have"):
        second_moments(model, tok, texts, [0], CountSettings(tokens=10_000_000))
    with pytest.raises(ValueError, match="no tokens"):
        second_moments(model, tok, [""], [0])
    few = second_moments(model, tok, texts[1:3], [0])
    with pytest.raises(ValueError, match=rf"h.0.mlp.c_proj is not positive definite: {few.count} tokens for 128 dim"):
        few.solve(name_of(model, "mlp_out", 0), torch.ones(128))


def test_solve_is_the_inverse_and_its_factor_is_kept():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(40, 40, dtype=torch.float64, generator=draw)
    moment, keys = root @ root.T + torch.eye(40), torch.randn(40, 3, generator=draw)
    one = Moments({"a": moment}, 100)
    expected = torch.linalg.inv(moment) @ keys.double()
    torch.testing.assert_close(one.solve("a", keys), expected, rtol=1e-9, atol=1e-12)
    factor = one.factors["a"]
    torch.testing.assert_close(one.solve("a", keys[:, 0]), expected[:, 0], rtol=1e-9, atol=1e-12)
    assert one.factors["a"] is factor
    with pytest.raises(ValueError, match="no second moment of b; there is one of a"):
        one.solve("b", keys)


def test_files(tmp_path):
    path = tmp_path / "c.safetensors"
    one = Moments({"x.y": torch.eye(3, dtype=torch.float64)}, 7)
    one.save(path)
    again = stats.load(path)
    assert again.count == 7 and torch.equal(again.moments["x.y"], one.moments["x.y"])
    with pytest.raises(FileNotFoundError, match="none"):
        stats.load(tmp_path / "none")
    path.write_bytes(b"12345678 no tensors")
    with pytest.raises(ValueError, match="c.safetensors: not a safetensors file"):
        stats.load(path)
    save_file({"other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="c.safetensors: no tensor C/"):
        stats.load(path)


def test_the_cache_is_met_by_content(gpt2, texts, tmp_path):
    model, tok = gpt2
    first = cached(model, tok, texts, [0, 1], tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    stamp = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    again = cached(model, tok, texts, [1, 0], tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == stamp
    direct = second_moments(model, tok, texts, [0, 1])
    for name, moment in direct.moments.items():
        assert torch.equal(first.moments[name], moment) and torch.equal(again.moments[name], moment)
    changed = make("gpt2", len(tok))
    changed.transformer.h[0].ln_1.weight[0] += 0.01
    other = cached(changed, tok, texts, [1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(other.moments[name_of(model, "mlp_out", 1)], first.moments[name_of(model, "mlp_out", 1)])
    for how, some in ((CountSettings(length=32), texts), (CountSettings(), texts[1:])):
        before = len(list(tmp_path.iterdir()))
        cached(model, tok, some, [0], tmp_path, how)
        assert len(list(tmp_path.iterdir())) == before + 1
