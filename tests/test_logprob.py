"""The oracle runs every prompt with its whole continuation alone and takes log-probabilities from model(...).logits."""

import numpy as np
import pytest
import torch
from conftest import make

from editcore import likelihood as logprob
from editcore.model import LAYOUTS

VOCABULARY = 90


def oracle(model, pairs):
    """(nll, token, exact) arrays of the pairs, one pass each."""
    found = []
    for prompt, target in pairs:
        logp = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        hits = [int(row.argmax()) == token for row, token in zip(logp, target)]
        nll = -np.mean([row[token].item() for row, token in zip(logp, target)])
        found.append((nll, np.mean(hits), float(all(hits))))
    return np.array(found).T


def random_pairs(model, common):
    """Twenty prompts that share `common` tokens, with continuations of one to four tokens, some of them the argmax."""
    draw = np.random.default_rng(0)
    start = draw.integers(1, VOCABULARY, common).tolist()
    pairs = []
    for _ in range(10):
        prompt = start + draw.integers(1, VOCABULARY, draw.integers(1, 12)).tolist()
        best = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
        pairs += [(prompt, draw.integers(1, VOCABULARY, draw.integers(1, 5)).tolist()), (prompt, [best])]
    return pairs


@pytest.mark.parametrize("common", [3, 20])
@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_read_is_the_serial_version(kind, common):
    model = make(kind, VOCABULARY, layers=2, dtype=torch.float64)
    pairs = random_pairs(model, common)
    plan = logprob.plan(model, pairs, max_tokens=60)
    assert plan.prefix.shape == (1, common if common >= 16 else 0)
    assert len(plan.batches) > 1
    tolerance = 1e-6 if kind == "gptj" else 1e-12    # GPT-J's attention is in float32 whatever its weights are
    found = logprob.read(model, plan)
    nll, token, exact = oracle(model, pairs)
    assert np.abs(found.nll - nll).max() < tolerance
    assert (found.token == token).all() and (found.exact == exact).all()
    assert 0 < exact.sum() < len(pairs)


def test_the_prefix_follows_the_weights():
    model = make("gpt2", VOCABULARY, layers=2)
    pairs = random_pairs(model, 20)
    made = logprob.plan(model, pairs)
    logprob.read(model, made)
    model.transformer.wte.weight.mul_(1.1)
    assert np.abs(logprob.read(model, made).nll - oracle(model, pairs)[0]).max() < 1e-4


def test_rows_are_shared_where_one_begins_another():
    rows, row_of = logprob.shared([(1, 2), (1, 2, 3), (1, 2), (1, 4), (1,), (2,)])
    assert sorted(rows) == [(1, 2, 3), (1, 4), (2,)]
    assert [rows[i] for i in row_of] == [(1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 4), (1, 2, 3), (2,)]


def test_nothing_is_run_twice():
    model = make("gpt2", VOCABULARY, layers=2)
    prompt = list(range(1, 30))
    pairs = [([*prompt, i], target) for i in (1, 2) for target in ([3], [4], [3, 5])]
    made = logprob.plan(model, [*pairs, *pairs])
    assert [sorted(batch.ids.tolist()) for batch in made.batches] == [[[1, 3], [2, 3]]]
    assert made.prefix.tolist() == [prompt]
    assert [len(part.place) for batch in made.batches for part in batch.chunks] == [4]


def test_the_head_runs_in_blocks(monkeypatch):
    model = make("gpt2", VOCABULARY, layers=2)
    pairs = random_pairs(model, 0)
    whole = logprob.read(model, logprob.plan(model, pairs))
    monkeypatch.setattr(logprob, "LOGITS", 5 * VOCABULARY)
    made = logprob.plan(model, pairs)
    assert max(len(part.place) for batch in made.batches for part in batch.chunks) == 5
    assert np.allclose(logprob.read(model, made).logp, whole.logp, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    model = make("gpt2", VOCABULARY, layers=1, dtype=torch.bfloat16)
    pairs = random_pairs(model, 0)
    found = logprob.read(model, logprob.plan(model, pairs))
    hidden = model.base_model(input_ids=torch.tensor([pairs[0][0]])).last_hidden_state[0, -1]
    logp = model.lm_head(hidden).float().log_softmax(-1)
    assert found.logp[0] == pytest.approx(logp[pairs[0][1][0]].item(), abs=0.05)
    assert found.logp[0] != torch.tensor(found.logp[0]).bfloat16().item()


def test_nobody_looks_for_padding(monkeypatch):
    model = make("gpt2", VOCABULARY, layers=1)
    seen = []
    monkeypatch.setattr(type(model.base_model), "warn_if_padding_and_no_attention_mask", lambda *_: seen.append(1))
    model.base_model(input_ids=torch.tensor([[7, 8]]))
    assert seen == [1]      # the check that warns, and reads the ids back from the device
    made = logprob.plan(model, random_pairs(model, 20))
    seen.clear()
    logprob.read(model, made)
    assert not seen


def test_no_pairs_no_work():
    model = make("gpt2", VOCABULARY, layers=1)
    found = logprob.read(model, logprob.plan(model, []))
    assert len(found.logp) == 0
