"""Causal traces equal GPT-2's forward pass written out, a prompt and a state at a time."""

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make, taught

from editcore import causal
from editcore.facts import Fact
from editcore.tokens import encode_pairs, subject_span, target_ids, with_subject

SUBJECTS = {"Orla": "Rome", "Vintar Melk": "Paris", "Sue Oakes": "Oslo",
            "Brantwick": "Lima", "Farrow": "Bern", "The Hollow Gate": "New Delhi"}


def some(n=6):
    return [Fact(case_id=i, subject=subject, prompt="It is known that {} is located in",
                 target_new="Turin", target_true=answer, relation="P1")
            for i, (subject, answer) in enumerate(list(SUBJECTS.items())[:n])]


def knowing(model, tok, facts):
    """A copy of the model that knows the facts."""
    return taught(model, encode_pairs(tok, [(fact.text, fact.target_true) for fact in facts]))


def forward(model, ids, noise=None, put=None):
    """(logits (T, V), {kind: outputs (L, T, d)}); put {(kind, layer): (token, state)}."""
    core, kept, put = model.transformer, {"state": [], "mlp": [], "attention": []}, put or {}
    hidden = core.wte(torch.tensor([ids])) + core.wpe(torch.arange(len(ids)))
    if noise is not None:
        hidden[0, noise[0] : noise[0] + len(noise[1])] += noise[1]

    def through(kind, layer, value):
        value = value.clone()
        if (kind, layer) in put:
            token, state = put[kind, layer]
            value[0, token] = state
        kept[kind].append(value[0])
        return value

    for layer, block in enumerate(core.h):
        hidden = hidden + through("attention", layer, block.attn(block.ln_1(hidden))[0])
        inner = through("mlp", layer, block.mlp(block.ln_2(hidden)))
        hidden = through("state", layer, hidden + inner)
    return model.lm_head(core.ln_f(hidden))[0], kept


def chance(logits, end, answer):
    logp = logits.log_softmax(-1)
    return float(np.exp(np.mean([logp[end + k, token].item() for k, token in enumerate(answer)])))


@pytest.mark.parametrize("window", [1, 2])
def test_trace_is_the_written_out_version(window):
    tok = byte_tokenizer()
    model, facts = make("gpt2", len(tok), layers=3, dtype=torch.float64), [some()[1], some()[5]]
    config = causal.Tracing(samples=2, window=window, seed=5, max_tokens=100)
    table = causal.trace(model, tok, facts, config).set_index(["kind", "role", "layer"])
    spans = [subject_span(tok, fact.prompt, fact.subject)[1:] for fact in facts]
    prompts = [tok(fact.text)["input_ids"] for fact in facts]
    pieces = [piece for ids, (first, last) in zip(prompts, spans)
              for piece in ids[first:last + 1]]
    sigma = model.transformer.wte.weight[pieces].std().item()
    generator, found, base = torch.Generator().manual_seed(5), {}, []
    for fact, prompt, (first, last) in zip(facts, prompts, spans):
        noise = 3 * sigma * torch.randn(2, last - first + 1, 32, generator=generator).double()
        answer, end = target_ids(tok, fact.target_true), len(prompt) - 1
        ids = prompt + answer[:-1]
        logits, clean = forward(model, ids)
        noised = np.mean([chance(forward(model, ids, (first, one))[0], end, answer)
                          for one in noise])
        base.append((chance(logits, end, answer), noised))
        roles = [[first], list(range(first + 1, last)),
                 [last], [last + 1], list(range(last + 2, end)), [end]]
        for role, tokens in ((role, tokens) for role, tokens in zip(causal.ROLES, roles) if tokens):
            for kind in causal.PARTS:
                for layer in range(3):
                    wide = 1 if kind == "state" else window
                    layers = [m for m in range(layer - wide // 2, layer - wide // 2 + wide)
                              if 0 <= m < 3]
                    values = [chance(forward(model, ids, (first, one),
                                             {(kind, m): (token, clean[kind][m][token])
                                              for m in layers})[0], end, answer)
                              for token in tokens for one in noise]
                    found.setdefault((kind, role, layer), []).append((np.mean(values), noised))
    assert set(table.index) == set(found) and len(found) == 3 * 6 * 3
    for key, values in found.items():
        row, (value, noised) = table.loc[key], 100 * np.array(values).T
        assert row["value"] == pytest.approx(value.mean(), rel=1e-9) and row["n"] == len(values)
        if len(values) > 1:
            assert row["sem"] == pytest.approx(value.std(ddof=1) / 2**0.5, rel=1e-6, abs=1e-12)
        assert row["effect"] == pytest.approx((value - noised).mean(), rel=1e-9, abs=1e-12)
        if len(values) == len(base):
            means = tuple(100 * np.array(base).mean(0))
            assert (row["clean"], row["noised"]) == pytest.approx(means, rel=1e-9)


def test_trace_brings_the_answer_back_where_it_must(llama):
    model, tok = llama
    facts = [fact for fact in some() if len(target_ids(tok, fact.target_true)) == 1]
    assert len(facts) > 1
    model = knowing(model, tok, facts)
    table = causal.trace(model, tok, facts, causal.Tracing(samples=3, kinds=("state",)))
    top = table[(table["role"] == "last token") & (table["layer"] == 3)].iloc[0]
    assert top["value"] == pytest.approx(top["clean"], rel=1e-4), "the state decides alone"
    assert top["clean"] > 60
    idle = table[(table["role"] == "last subject token") & (table["layer"] == 3)].iloc[0]
    assert idle["effect"] == pytest.approx(0, abs=1e-4)  # nobody reads it any more
    assert idle["noised"] < idle["clean"]
    assert list(table["role"].unique()) == [causal.ROLES[0], *causal.ROLES[2:]]
    again = causal.trace(model, tok, facts, causal.Tracing(samples=3, kinds=("state",)))
    assert table.equals(again)
    other = causal.trace(model, tok, facts, causal.Tracing(samples=3, kinds=("state",), seed=1))
    assert not table.equals(other)


@pytest.mark.parametrize("span, places", [((1, 4, 8), ([1], [2, 3], [4], [5], [6, 7], [8])),
                                          ((2, 2, 3), ([], [], [2], [], [], [3])),
                                          ((2, 4, 4), ([2], [3], [], [], [], []))])
def test_roles_by_hand(span, places):
    ids = torch.arange(9)
    expected = {role: tokens for role, tokens in zip(causal.ROLES, places) if tokens}
    assert causal.roles(causal.TracedFact(ids, ids, *span)) == expected


def test_patching_is_the_written_out_version():
    tok = byte_tokenizer()
    facts = some()
    model = knowing(make("gpt2", len(tok), layers=3, dtype=torch.float64), tok, facts)
    table = causal.patching(model, tok, facts, count=5, seed=2, max_tokens=60)
    hits = {}
    pairs = causal._partners(tok, facts, 5, 2)
    assert len(pairs) == 5 and all(one.target_true != other.target_true for one, other in pairs)
    for one, other in pairs:
        ids, source = (tok(fact.text)["input_ids"] for fact in (one, other))
        ends = [with_subject(tok, fact.prompt, fact.subject)[1] for fact in (one, other)]
        states = forward(model, source)[1]["state"]
        for layer in range(3):
            spots = {"subject": ends, "last": (len(ids) - 1, len(source) - 1)}
            for position, (put, take) in spots.items():
                logits, _ = forward(model, ids, put={("state", layer): (put, states[layer][take])})
                hit = logits[-1].argmax().item() == target_ids(tok, other.target_true)[0]
                hits[position, layer] = hits.get((position, layer), 0) + hit
    states = table[table["position"] != "mlp"]
    values = states.set_index(["position", "layer"])["value"].to_dict()
    assert values == {key: value / 5 for key, value in hits.items()}
    assert 0 < states["value"].mean() < 1 and set(table["n"]) == {5}


def test_the_last_state_carries_the_answer_and_the_subject_no_more(llama):
    model, tok = llama
    facts = some()
    model = knowing(model, tok, facts)
    table, again = (causal.patching(model, tok, facts) for _ in range(2))
    assert table.equals(again)
    table = table.set_index(["position", "layer"])["value"]
    assert table["last", 3] == 1 and table["subject", 3] == 0


def test_one_error_names_the_record(gpt2):
    model, tok = gpt2
    with pytest.raises(ValueError, match="record a: no target_true"):
        plain = Fact(case_id="a", subject="Orla", prompt="{} is", target_new="b")
        causal.trace(model, tok, [plain])
    long = Fact(case_id="b", subject="Orla", prompt="{} is " + "in the river " * 40,
                target_new="Rome", target_true="Oslo", relation="P1")
    with pytest.raises(ValueError, match="record b: .* at most 64"):
        causal.trace(model, tok, [long])
    with pytest.raises(ValueError, match="record b: .* at most 64"):
        causal.patching(model, tok, [long, *some(2)])
    with pytest.raises(ValueError, match="no facts"):
        causal.trace(model, tok, [])
    ends = Fact(case_id="c", subject="Orla",
                prompt="It is {}", target_new="Rome", target_true="Oslo", relation="P1")
    with pytest.raises(ValueError, match="none of 2 facts has a partner"):
        causal.patching(model, tok, [ends, some(1)[0]])


def test_margins_and_windows_of_mlps_are_the_written_out_version():
    tok = byte_tokenizer()
    facts = some()
    model = knowing(make("gpt2", len(tok), layers=4, dtype=torch.float64), tok, facts)
    table = causal.patching(model, tok, facts, count=5, seed=2, max_tokens=60)
    table = table.set_index(["position", "layer"])["margin"]
    moved = {}
    apart = 0.0
    for one, other in causal._partners(tok, facts, 5, 2):
        own, wanted = (target_ids(tok, fact.target_true)[0] for fact in (one, other))
        ids, source = (tok(fact.text)["input_ids"] for fact in (one, other))
        put, take = (with_subject(tok, fact.prompt, fact.subject)[1] for fact in (one, other))
        outputs = forward(model, source)[1]
        here, there = (forward(model, row)[0][-1] for row in (ids, source))
        begin = here[wanted] - here[own]
        apart += there[wanted] - there[own] - begin
        for layer in range(4):
            window = range(max(0, layer - 1), min(4, layer + 2))
            changes = {"subject": {("state", layer): (put, outputs["state"][layer][take])},
                       "mlp": {("mlp", i): (put, outputs["mlp"][i][take]) for i in window}}
            for position, change in changes.items():
                logits = forward(model, ids, put=change)[0][-1]
                margin = logits[wanted] - logits[own] - begin
                moved[position, layer] = moved.get((position, layer), 0) + margin
    for key, value in moved.items():
        assert table[key] == pytest.approx((value / apart).item(), abs=1e-9)
    assert table["mlp", 0] != table["mlp", 3]
