"""editcore.generate: batched continuations equal those of one prompt at a time by a plain loop."""

import pytest
import torch

from editcore import generate
from editcore.generate import continuations, texts
from editcore.hooks import run
from editcore.tokens import batches

PROMPTS = ["Orla is", "The capital of Vintar Melk", "Everybody knows that Sue Oakes lies", "Rome"]


def plain(model, tok, prompt, n_new):
    """Greedy continuation by whole forward passes, no cache and no padding."""
    ids = list(tok(prompt)["input_ids"])
    for _ in range(n_new):
        ids.append(run(model, input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-n_new:]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_equals_the_plain_loop(family, request, monkeypatch):
    model, tok = request.getfixturevalue(family)
    expected = [plain(model, tok, prompt, 6) for prompt in PROMPTS]
    assert continuations(model, tok, PROMPTS, 6).tolist() == expected
    monkeypatch.setattr(generate, "batches", lambda lengths: batches(lengths, max_tokens=10))
    assert continuations(model, tok, PROMPTS, 6).tolist() == expected       # one prompt a batch
    assert texts(model, tok, PROMPTS[:2], 6) == tok.batch_decode(expected[:2])


def test_sampling_follows_its_generator_and_the_top_k(gpt2):
    model, tok = gpt2
    def draw(seed, top_k=5):
        return continuations(model, tok, PROMPTS * 5, 4, top_k, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), continuations(model, tok, PROMPTS * 5, 4))
    ids = torch.tensor([tok("Rome")["input_ids"]])
    best = set(run(model, input_ids=ids).logits[0, -1].topk(5).indices.tolist())
    first = continuations(model, tok, ["Rome"] * 60, 1, 5, torch.Generator().manual_seed(2))[:, 0].tolist()
    assert set(first) <= best and len(set(first)) > 1


def test_too_long_prompts_are_named(gpt2):
    model, tok = gpt2
    with pytest.raises(ValueError, match="prompt 'Rome.*exceed the model's 64"):
        continuations(model, tok, ["Rome " * 40], 30)
