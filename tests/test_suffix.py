"""editcore.suffix: the model from one block and one token on gives what the whole model gives."""

import pytest
import torch
from conftest import make

from editcore import suffix
from editcore.hooks import capture, replaced
from editcore.model import name_of

LENGTHS = torch.tensor([12, 8, 10, 5, 12])
BEGIN = torch.tensor([3, 0, 7, 2, 9])
MASK = (torch.arange(12) < LENGTHS[:, None]).long()
FEW = torch.tensor([[4, 3], [1, 1], [2, 0], [2, 1], [2, 2]])    # the last block at these only
ALL = torch.arange(5).expand(5, 5)
IDS = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(0))
# Families that take their softmax or their rotary products in float32 whatever the model's dtype
LOOSE = {("gptj", "sdpa"), ("gptj", "eager"), ("gpt_neox", "eager"), ("llama", "eager"),
         ("mistral", "eager"), ("qwen2", "eager"), ("qwen3", "eager")}


def drawn():
    return torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def oracle(model, layer, delta):
    """Logits of the whole model with `delta` added at BEGIN to the block's output."""
    def change(h):
        h = h.clone()
        h[torch.arange(5), BEGIN] += delta
        return h

    with replaced(model, name_of(model, "block", layer), change):
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def resumed(model, state, delta):
    first = state.hidden[:, 0] + delta
    hidden = torch.cat([first[:, None], state.hidden[:, 1:]], 1)
    return suffix.head(model, suffix.resume(model, state, hidden))


@pytest.mark.parametrize("kind, attention", [
    ("gpt2", "sdpa"), ("gpt2", "eager"), ("gptj", "eager"), ("gpt_neox", "sdpa"),
    ("gpt_neox", "eager"), ("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"),
    ("qwen2", "sdpa"), ("qwen3", "sdpa"), ("qwen3", "eager")])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_equals_the_whole_model(kind, attention, layer):
    model = make(kind, 50, dtype=torch.float64)
    if kind != "gptj":      # has one attention only
        model.set_attn_implementation(attention)
    expected = oracle(model, layer, drawn())
    some = torch.tensor([4, 1, 2, 0])
    tolerance = 3e-6 if (kind, attention) in LOOSE else 1e-12
    for wanted in (FEW, ALL):
        state = suffix.start(model, IDS, MASK, begin=BEGIN, layer=layer, wanted=wanted)
        assert bool(state.lanes.top) == (wanted is FEW and layer < 3)
        for part, rows in ((state, torch.arange(5)), (state.rows(some), some)):
            logits = resumed(model, part, drawn())
            places = BEGIN[rows, None] + wanted[rows]
            inside = places < LENGTHS[rows, None]
            whole = expected[rows[:, None], places.clamp(max=11)]
            torch.testing.assert_close(logits[inside], whole[inside], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind, tolerance", [("gpt2", 1e-12), ("llama", 1e-6)])   # float32 norms
@pytest.mark.parametrize("wanted", [FEW, ALL], ids=["few", "all"])
def test_gradients_equal_those_of_the_whole_model(kind, tolerance, wanted):
    model = make(kind, 50, dtype=torch.float64)
    delta = drawn().requires_grad_()
    rows = torch.arange(5)
    offsets = FEW[:, 0].clamp(max=2)
    logits = oracle(model, 1, delta)[rows, BEGIN + offsets]
    expected, = torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), delta)
    state = suffix.start(model, IDS, MASK, begin=BEGIN, layer=1, wanted=wanted.clamp(max=2))
    columns = 0 * offsets if wanted is FEW else offsets
    logits = resumed(model, state, delta)[rows, columns]
    gradient, = torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), delta)
    assert ((gradient - expected).norm() / expected.norm()).item() < tolerance


def test_captures_see_the_suffix_last(gpt2):
    model, _ = gpt2
    name = name_of(model, "mlp_out", 1)
    with capture(model, [name], "input", stop=False) as part:
        suffix.start(model, IDS, MASK, begin=BEGIN, layer=2, wanted=ALL)
    with torch.no_grad(), capture(model, [name], "input", stop=False) as whole:
        model(input_ids=IDS, attention_mask=MASK)
    expected = whole[name][torch.arange(5), BEGIN]
    torch.testing.assert_close(part[name][:, 0], expected, rtol=1e-5, atol=1e-6)


def test_the_fused_gelu_is_the_same_function_and_nothing_is_left(gpt2):
    model, _ = gpt2
    mlp = model.transformer.h[0].mlp
    kinds = [type(module) for module in model.modules()]
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    with suffix.fused(model):
        assert kinds != [type(module) for module in model.modules()]
        fused = mlp.act(x)
        suffix.start(model, IDS, MASK, begin=BEGIN, layer=1, wanted=ALL)
    torch.testing.assert_close(fused, mlp.act(x), rtol=1e-12, atol=1e-14)
    assert kinds == [type(module) for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_quick_products_equal_the_modules_and_nothing_is_left(kind):
    model = make(kind, 50)
    model.lm_head.weight.requires_grad_()       # a map that takes gradients stays as it is
    x = torch.randn(3, 32, requires_grad=True, generator=torch.Generator().manual_seed(0))
    maps = [model.get_submodule(name_of(model, "mlp_in", 1)), model.lm_head]

    def values():
        y = sum(module(x).square().sum() for module in maps)
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        return y, slope, *torch.autograd.grad(slope.square().sum(), x)

    expected = values()
    with suffix.quick(model):
        assert "forward" in vars(maps[0]) and "forward" not in vars(maps[1])
        torch.testing.assert_close(values(), expected, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_head_of_a_half_precision_model_ties_no_tokens(monkeypatch):
    monkeypatch.setattr(suffix, "HEAD_ROWS", 300)
    model = make("gpt2", 1000, dtype=torch.bfloat16)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[:, 0] = 8.0
    with torch.no_grad():
        model.lm_head.weight[:, 0] = -10.0      # logits near -80, as GPT-2's are
        logits = suffix.head(model, hidden)
        exact = hidden.double() @ model.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-4 < (model.lm_head(hidden) - exact).abs().max()
    assert min(len(row.unique()) for row in logits) > 990


def test_a_row_beyond_the_attention_window_is_refused():
    model = make("mistral", 50)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="12 tokens is longer than .* attention window of 8"):
        suffix.start(model, IDS, MASK, begin=BEGIN, layer=1, wanted=ALL)
