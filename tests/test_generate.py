"""editcore.generate: batched continuations equal a plain loop; texts by the model itself."""

import copy

import pytest
import torch

from editcore import generate
from editcore.generate import answers, continuations, own_texts, texts
from editcore.hooks import run
from editcore.tokens import batches, encode

PROMPTS = ["Orla is", "The capital of Vintar Melk", "Everybody knows that Sue Oakes lies", "Rome"]


def plain(model, tok, prompt, n_new):
    """Greedy continuation by whole forward passes, no cache and no padding."""
    ids = list(tok(prompt)["input_ids"])
    for _ in range(n_new):
        ids.append(run(model, input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-n_new:]


@pytest.mark.parametrize("begin", ["", "Everybody knows that Sue Oakes knows well that "])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_equals_the_plain_loop(family, begin, request, monkeypatch):
    model, tok = request.getfixturevalue(family)
    prompts = [begin + prompt for prompt in PROMPTS]
    expected = [plain(model, tok, prompt, 6) for prompt in prompts]
    assert continuations(model, tok, prompts, 6).tolist() == expected
    monkeypatch.setattr(generate, "batches", lambda lengths: batches(lengths, max_tokens=10))
    assert continuations(model, tok, prompts, 6).tolist() == expected   # one prompt at a time
    assert texts(model, tok, prompts[:2], 6) == tok.batch_decode(expected[:2])


def test_answers_end_with_the_text(gpt2):
    model, tok = copy.deepcopy(gpt2[0]), gpt2[1]
    plain = texts(model, tok, PROMPTS, 6)
    assert answers(model, tok, PROMPTS, 6) == [text.strip() for text in plain]
    end = tok.eos_token_id
    model.lm_head = torch.nn.Linear(32, len(tok))   # not tied to the embeddings
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.eye(len(tok))[end]
    assert continuations(model, tok, PROMPTS, 6, end=end).tolist() == [[end] * 6] * 4
    assert answers(model, tok, PROMPTS, 6) == [""] * 4


def test_sampling_follows_its_generator_and_the_top_k(gpt2):
    model, tok = gpt2

    def draw(seed, top_k=5):
        generator = torch.Generator().manual_seed(seed)
        return continuations(model, tok, PROMPTS * 5, 4, top_k=top_k, generator=generator)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), continuations(model, tok, PROMPTS * 5, 4))
    ids = torch.tensor([tok("Rome")["input_ids"]])
    best = set(run(model, input_ids=ids).logits[0, -1].topk(5).indices.tolist())
    generator = torch.Generator().manual_seed(2)
    first = continuations(model, tok, ["Rome"] * 60, 1, top_k=5, generator=generator)
    assert len(set(first[:, 0].tolist())) > 1 and set(first[:, 0].tolist()) <= best


def test_too_long_prompts_are_named(gpt2):
    with pytest.raises(ValueError, match="prompt 'Rome.* at most 64"):
        continuations(*gpt2, ["Rome " * 40], 30)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_writes_texts_that_are_kept_by_content(family, request, tmp_path):
    model, tok = request.getfixturevalue(family)
    first = own_texts(model, tok, 9000, folder=tmp_path)
    assert sum(map(len, encode(tok, first))) >= 9000
    assert not any(tok.eos_token in text or not text.strip() for text in first)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert own_texts(model, tok, 9000, folder=tmp_path) == first
    assert path.stat().st_mtime_ns == stamp
    assert own_texts(model, tok, 9000, seed=1, folder=tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_how_much_the_model_writes(gpt2, tmp_path, monkeypatch):
    model, tok = gpt2
    numbers = []
    monkeypatch.setattr(generate, "_sampled_texts", lambda *args: numbers.append(args[2]) or ["a"])
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path))
    assert own_texts(model, tok) == ["a"]
    monkeypatch.setattr(generate, "in_out", lambda module: (6400, 1600))
    own_texts(model, tok)
    assert numbers == [20_000, 25_600] and len(list(tmp_path.iterdir())) == 2
