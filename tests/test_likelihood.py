"""editcore.likelihood: scores equal a pass per pair, from fewer passes, heads in chunks."""

import numpy as np
import pytest
import torch
from conftest import make

from editcore import likelihood
from editcore.likelihood import above, enter, plan, read, shared, states
from editcore.model import LAYOUTS

VOCABULARY = 90


def oracle(model, pairs):
    """(nll, token, exact) arrays of the pairs, each run alone with its whole continuation."""
    rows = []
    for prompt, target in pairs:
        logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
        logp = logits[len(prompt) - 1:-1].log_softmax(-1)
        hits = [int(row.argmax()) == token for row, token in zip(logp, target)]
        nll = -np.mean([row[token].item() for row, token in zip(logp, target)])
        rows.append((nll, np.mean(hits), float(all(hits))))
    return np.array(rows).T


def random_pairs(model, common):
    """Twenty prompts that share `common` tokens; targets of one to four tokens, some the argmax."""
    draw = np.random.default_rng(0)
    start = draw.integers(1, VOCABULARY, common).tolist()
    pairs = []
    for _ in range(10):
        prompt = start + draw.integers(1, VOCABULARY, draw.integers(1, 12)).tolist()
        best = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
        target = draw.integers(1, VOCABULARY, draw.integers(1, 5)).tolist()
        pairs += [(prompt, target), (prompt, [best])]
    return pairs


@pytest.mark.parametrize("common", [3, 20])
@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_read_is_the_serial_version(kind, common):
    model = make(kind, VOCABULARY, layers=2, dtype=torch.float64)
    pairs = random_pairs(model, common)
    scoring = plan(model, pairs, max_tokens=60)
    assert scoring.prefix.shape == (1, common if common >= 16 else 0)
    assert len(scoring.batches) > 1
    scores = read(model, scoring)
    nll, token, exact = oracle(model, pairs)
    tolerance = 1e-6 if kind == "gptj" else 1e-12    # GPT-J's attention is always in float32
    assert np.abs(scores.nll - nll).max() < tolerance
    assert (scores.token == token).all() and (scores.exact == exact).all()
    assert 0 < exact.sum() < len(pairs)


def test_the_prefix_follows_the_weights():
    model = make("gpt2", VOCABULARY, layers=2)
    pairs = random_pairs(model, 20)
    scoring = plan(model, pairs)
    read(model, scoring)
    model.transformer.wte.weight.mul_(1.1)
    assert np.abs(read(model, scoring).nll - oracle(model, pairs)[0]).max() < 1e-4


def test_rows_are_shared_where_one_begins_another():
    rows, row_of = shared([(1, 2), (1, 2, 3), (1, 2), (1, 4), (1,), (2,)])
    assert sorted(rows) == [(1, 2, 3), (1, 4), (2,)]
    long = (1, 2, 3)
    assert [rows[i] for i in row_of] == [long, long, long, (1, 4), long, (2,)]


def test_nothing_is_run_twice():
    model = make("gpt2", VOCABULARY, layers=2)
    prompt = list(range(1, 30))
    pairs = [([*prompt, i], target) for i in (1, 2) for target in ([3], [4], [3, 5])]
    scoring = plan(model, [*pairs, *pairs])
    assert scoring.prefix.tolist() == [prompt]
    (batch,) = scoring.batches
    assert sorted(batch.ids.tolist()) == [[1, 3], [2, 3]]
    assert [len(chunk.place) for chunk in batch.chunks] == [4]
    empty = plan(model, [])
    assert not empty.batches and len(read(model, empty).logp) == 0


def test_the_head_runs_in_chunks(monkeypatch):
    model = make("gpt2", VOCABULARY, layers=2)
    pairs = random_pairs(model, 0)
    whole = read(model, plan(model, pairs))
    monkeypatch.setattr(likelihood, "LOGITS", 5 * VOCABULARY)
    scoring = plan(model, pairs)
    assert max(len(chunk.place) for batch in scoring.batches for chunk in batch.chunks) == 5
    assert np.allclose(read(model, scoring).logp, whole.logp, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    model = make("gpt2", VOCABULARY, layers=1, dtype=torch.bfloat16)
    (prompt, target), *_ = pairs = random_pairs(model, 0)
    logp = read(model, plan(model, pairs)).logp[0]
    hidden = model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    expected = model.lm_head(hidden).float().log_softmax(-1)[target[0]].item()
    assert logp == pytest.approx(expected, abs=0.05)
    assert logp != torch.tensor(logp).bfloat16().item()


def test_nobody_looks_for_padding(monkeypatch):
    model = make("gpt2", VOCABULARY, layers=1)
    calls = []
    monkeypatch.setattr(type(model.base_model), "warn_if_padding_and_no_attention_mask",
                        lambda *_: calls.append(1))
    model.base_model(input_ids=torch.tensor([[7, 8]]))
    assert calls == [1]     # the check that warns, and reads the ids back from the device
    scoring = plan(model, random_pairs(model, 20))
    calls.clear()
    read(model, scoring)
    assert not calls


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
@pytest.mark.parametrize("layer", [0, 1])
def test_the_blocks_above_go_on_from_what_enters_one(kind, layer):
    model = make(kind, VOCABULARY, layers=2)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 10, 11]])
    inputs = enter(model, ids, layer)
    assert torch.equal(above(model, inputs), states(model, ids))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_half_precision_logits_are_not_rounded(kind):
    model = make(kind, VOCABULARY, layers=1, dtype=torch.bfloat16)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = model.get_output_embeddings()
    exact = hidden.double() @ layer.weight.double().T
    exact = exact if layer.bias is None else exact + layer.bias.double()
    torch.testing.assert_close(likelihood.head(model, hidden).double(), exact, rtol=0, atol=1e-5)
    assert len(likelihood.head(model, hidden).unique()) > len(layer(hidden).unique())
