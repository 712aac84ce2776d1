"""editcore.tail: the model from one block and one token on gives what the whole model gives."""

import pytest
import torch
from conftest import make

from editcore import suffix as tail
from editcore.hooks import capture, replaced
from editcore.model import name_of

LENGTHS, BEGIN = torch.tensor([12, 8, 10, 5, 12]), torch.tensor([3, 0, 7, 2, 9])
MASK = (torch.arange(12) < LENGTHS[:, None]).long()
FEW = torch.tensor([[4, 3], [1, 1], [2, 0], [2, 1], [2, 2]])     # the last block at these offsets only
ALL = torch.arange(5).expand(5, 5)
# Families that take their softmax or their rotary products in float32 whatever the model's dtype
LOOSE = {("gptj", "sdpa"), ("gptj", "eager"), ("gpt_neox", "eager"), ("llama", "eager"), ("mistral", "eager"),
         ("qwen2", "eager"), ("qwen3", "eager")}


def ids():
    return torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(0))


def oracle(model, layer, delta):
    """Logits of the whole model with `delta` added at BEGIN to the block's output."""
    def change(h):
        h = h.clone()
        h[torch.arange(5), BEGIN] += delta
        return h
    with replaced(model, name_of(model, "block", layer), change):
        return model(input_ids=ids(), attention_mask=MASK, use_cache=False).logits


def resumed(model, state, delta):
    first = state.hidden[:, 0] + delta
    return tail.head(model, tail.resume(model, state, torch.cat([first[:, None], state.hidden[:, 1:]], 1)))


@pytest.mark.parametrize("kind, way", [("gpt2", "sdpa"), ("gpt2", "eager"), ("gptj", "eager"), ("gpt_neox", "sdpa"),
                                       ("gpt_neox", "eager"), ("llama", "sdpa"), ("llama", "eager"),
                                       ("mistral", "sdpa"), ("qwen2", "sdpa"), ("qwen3", "sdpa"), ("qwen3", "eager")])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_equals_the_whole_model(kind, way, layer):
    model = make(kind, 50, dtype=torch.float64)
    if kind != "gptj":      # has one way only
        model.set_attn_implementation(way)
    delta = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = oracle(model, layer, delta)
    some = torch.tensor([4, 1, 2, 0])
    for wanted in (FEW, ALL):
        state = tail.start(model, ids(), MASK, BEGIN, layer, wanted)
        assert bool(state.top) == (wanted is FEW and layer < 3)
        for one, rows in ((state, torch.arange(5)), (state.rows(some), some)):
            logits = resumed(model, one, delta)
            for spot, row in enumerate(rows.tolist()):
                for column, offset in enumerate(wanted[row].tolist()):
                    if (at := int(BEGIN[row]) + offset) < LENGTHS[row]:
                        torch.testing.assert_close(logits[spot, column], expected[row, at], rtol=0,
                                                   atol=3e-6 if (kind, way) in LOOSE else 1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("wanted", [FEW, ALL], ids=["few", "all"])
def test_gradients_equal_those_of_the_whole_model(kind, wanted):
    model, layer = make(kind, 50, dtype=torch.float64), 1
    delta = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows = torch.arange(5)
    whole = oracle(model, layer, delta)[rows, BEGIN + FEW[:, 0].clamp(max=2)].log_softmax(-1)[:, 7].sum()
    wanted = wanted.clamp(max=2)
    state = tail.start(model, ids(), MASK, BEGIN, layer, wanted)
    column = torch.zeros(5, dtype=torch.long) if len(wanted[0]) == 2 else FEW[:, 0].clamp(max=2)
    part = resumed(model, state, delta)[rows, column].log_softmax(-1)[:, 7].sum()
    a, b = (torch.autograd.grad(loss, delta)[0] for loss in (part, whole))
    # Llama's norms work in float32 whatever the model's dtype
    assert ((a - b).norm() / b.norm()).item() < {"gpt2": 1e-12, "llama": 1e-6}[kind]


def test_captures_see_the_suffix_last(gpt2):
    model, _ = gpt2
    name = name_of(model, "mlp_out", 1)
    with capture(model, [name], "input", stop=False) as kept:
        tail.start(model, ids(), MASK, BEGIN, 2, ALL)
    with torch.no_grad(), capture(model, [name], "input", stop=False) as whole:
        model(input_ids=ids(), attention_mask=MASK)
    torch.testing.assert_close(kept[name][:, 0], whole[name][torch.arange(5), BEGIN], rtol=1e-5, atol=1e-6)


def test_nothing_is_left_in_the_model(gpt2):
    model, _ = gpt2
    kinds = [type(module) for module in model.modules()]
    with tail.fused(model):
        assert kinds != [type(module) for module in model.modules()]
        tail.start(model, ids(), MASK, BEGIN, 1, ALL)
    assert kinds == [type(module) for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_fused_gelu_is_the_same_function(gpt2):
    model, _ = gpt2
    kind = type(model.transformer.h[0].mlp.act)
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    with tail.fused(model):
        assert type(model.transformer.h[0].mlp.act) is not kind
        fused = model.transformer.h[0].mlp.act(x)
    torch.testing.assert_close(fused, model.transformer.h[0].mlp.act(x), rtol=1e-12, atol=1e-14)


def test_a_row_beyond_the_attention_window_is_refused():
    model = make("mistral", 50)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="12 tokens is longer than the model's attention window of 8"):
        tail.start(model, ids(), MASK, BEGIN, 1, ALL)
