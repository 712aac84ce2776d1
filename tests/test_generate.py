"""The oracle continues one prompt at a time by the argmax of model(...).logits, without a cache."""

import copy

import pytest
import torch
from conftest import byte_tokenizer, make

from editcore import generate
from editcore.model import LAYOUTS

SHARED = "You said that it is good. The first. Therefore the old river runs. "
PROMPTS = ["Orla is", "The capital of Sue Oakes is", "I", "In the city of Rome"]


def serial(model, tok, prompt, n_new):
    ids = tok(prompt)["input_ids"]
    for _ in range(n_new):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n_new:]


@pytest.mark.parametrize("start", ["", SHARED])
@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_greedy_is_the_serial_version(kind, start):
    tok = byte_tokenizer()
    model = make(kind, len(tok), layers=2, dtype=torch.float64)
    prompts = [start + prompt for prompt in PROMPTS]
    found = generate.continuations(model, tok, prompts, 5, max_tokens=60)
    assert found.tolist() == [serial(model, tok, prompt, 5) for prompt in prompts]


def test_what_prompts_share_is_run_once(gpt2):
    model, tok = gpt2
    widths = []
    handle = model.transformer.wte.register_forward_hook(lambda _, args, out: widths.append(tuple(args[0].shape)))
    generate.continuations(model, tok, [SHARED + prompt for prompt in PROMPTS], 2)
    handle.remove()
    rows = [tok(SHARED + prompt)["input_ids"] for prompt in PROMPTS]
    skip = widths[0][1]
    assert skip >= 16 and all(row[:skip] == rows[0][:skip] for row in rows)
    assert widths == [(1, skip), (4, max(map(len, rows)) - skip), (4, 1)]


def test_draws_follow_the_seed_and_the_top_k(gpt2):
    model, tok = gpt2

    def drawn(seed, k=3):
        return generate.continuations(model, tok, PROMPTS, 8, k, torch.Generator().manual_seed(seed)).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, 1) == generate.continuations(model, tok, PROMPTS, 8).tolist()
    for prompt, new in zip(PROMPTS, drawn(3)):
        ids = tok(prompt)["input_ids"]
        for token in new:
            assert token in model(input_ids=torch.tensor([ids])).logits[0, -1].topk(3).indices
            ids = [*ids, token]


def test_a_broken_model_still_writes(gpt2):
    model, tok = copy.deepcopy(gpt2[0]), gpt2[1]
    model.get_output_embeddings().weight.fill_(float("nan"))
    assert generate.continuations(model, tok, PROMPTS, 3, 5, torch.Generator().manual_seed(0)).shape == (4, 3)


def test_too_long_is_one_error(gpt2):
    model, tok = gpt2
    with pytest.raises(ValueError, match="prompt 'I': 1 . 70 new tokens exceed the model's 64"):
        generate.continuations(model, tok, ["I", *PROMPTS], 70)
    assert generate.continuations(model, tok, [], 3).shape == (0, 3)
