"""Causal traces equal GPT-2's forward pass written out, a prompt and a state at a time."""

import copy

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make

from editcore import causal
from editcore.facts import Fact
from editcore.tokens import subject_span, target_ids, with_subject

SUBJECTS = {
    "Orla": "Rome",
    "Vintar Melk": "Paris",
    "Sue Oakes": "Oslo",
    "Brantwick": "Lima",
    "Farrow": "Bern",
    "The Hollow Gate": "New Delhi",
}


def some(n=6):
    return [
        Fact(
            case_id=i,
            subject=subject,
            prompt="It is known that {} is located in",
            target_new="Turin",
            target_true=answer,
            relation="P1",
        )
        for i, (subject, answer) in enumerate(list(SUBJECTS.items())[:n])
    ]


def taught(model, tok, facts, steps=40):
    """A copy of the model that knows the facts."""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        for fact in facts:
            ids, answer = tok(fact.text)["input_ids"], target_ids(tok, fact.target_true)
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
        optimizer.step()
    return model.requires_grad_(False)


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
        hidden = through(
            "state", layer, hidden + through("mlp", layer, block.mlp(block.ln_2(hidden)))
        )
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
    pieces = [
        piece for ids, (first, last) in zip(prompts, spans) for piece in ids[first : last + 1]
    ]
    sigma = model.transformer.wte.weight[pieces].std().item()
    generator, found, base = torch.Generator().manual_seed(5), {}, []
    for fact, prompt, (first, last) in zip(facts, prompts, spans):
        noise = 3 * sigma * torch.randn(2, last - first + 1, 32, generator=generator).double()
        answer, end = target_ids(tok, fact.target_true), len(prompt) - 1
        ids = prompt + answer[:-1]
        logits, clean = forward(model, ids)
        noised = np.mean(
            [chance(forward(model, ids, (first, one))[0], end, answer) for one in noise]
        )
        base.append((chance(logits, end, answer), noised))
        roles = [
            [first],
            list(range(first + 1, last)),
            [last],
            [last + 1],
            list(range(last + 2, end)),
            [end],
        ]
        for role, tokens in ((role, tokens) for role, tokens in zip(causal.ROLES, roles) if tokens):
            for kind in causal.PARTS:
                for layer in range(3):
                    wide = 1 if kind == "state" else window
                    layers = [
                        m for m in range(layer - wide // 2, layer - wide // 2 + wide) if 0 <= m < 3
                    ]
                    values = [
                        chance(
                            forward(
                                model,
                                ids,
                                (first, one),
                                {(kind, m): (token, clean[kind][m][token]) for m in layers},
                            )[0],
                            end,
                            answer,
                        )
                        for token in tokens
                        for one in noise
                    ]
                    found.setdefault((kind, role, layer), []).append((np.mean(values), noised))
    assert set(table.index) == set(found) and len(found) == 3 * 6 * 3
    for key, values in found.items():
        row, (value, noised) = table.loc[key], 100 * np.array(values).T
        assert row["value"] == pytest.approx(value.mean(), rel=1e-9) and row["n"] == len(values)
        if len(values) > 1:
            assert row["sem"] == pytest.approx(value.std(ddof=1) / 2**0.5, rel=1e-6, abs=1e-12)
        assert row["effect"] == pytest.approx((value - noised).mean(), rel=1e-9, abs=1e-12)
        if len(values) == len(base):
            assert (row["clean"], row["noised"]) == pytest.approx(
                tuple(100 * np.array(base).mean(0)), rel=1e-9
            )


def test_trace_brings_the_answer_back_where_it_must(llama):
    model, tok = llama
    facts = [fact for fact in some() if len(target_ids(tok, fact.target_true)) == 1]
    assert len(facts) > 1
    model = taught(model, tok, facts)
    assert (
        causal.known(
            model, tok, [*facts, Fact(case_id=9, subject="Orla", prompt="{} is", target_new="b")]
        )
        == facts
    )
    table = causal.trace(model, tok, facts, causal.Tracing(samples=3, kinds=("state",)))
    top = table[(table["role"] == "last token") & (table["layer"] == 3)].iloc[0]
    assert (
        top["value"] == pytest.approx(top["clean"], rel=1e-4) and top["clean"] > 60
    )  # the state decides alone
    idle = table[(table["role"] == "last subject token") & (table["layer"] == 3)].iloc[0]
    assert idle["effect"] == pytest.approx(0, abs=1e-4)  # nobody reads it any more
    assert idle["noised"] < idle["clean"]
    assert list(table["role"].unique()) == [
        role for role in causal.ROLES if role != causal.ROLES[1]
    ]
    again = causal.trace(model, tok, facts, causal.Tracing(samples=3, kinds=("state",)))
    assert table.equals(again)
    assert not table.equals(
        causal.trace(model, tok, facts, causal.Tracing(samples=3, kinds=("state",), seed=1))
    )


def test_roles_by_hand():
    ids = torch.arange(9)
    assert causal.roles(causal.TracedFact(ids, ids, 1, 4, 8)) == {
        "first subject token": [1],
        "middle subject tokens": [2, 3],
        "last subject token": [4],
        "first subsequent token": [5],
        "further tokens": [6, 7],
        "last token": [8],
    }
    assert causal.roles(causal.TracedFact(ids, ids, 2, 2, 3)) == {
        "last subject token": [2],
        "last token": [3],
    }
    assert causal.roles(causal.TracedFact(ids, ids, 2, 4, 4)) == {
        "first subject token": [2],
        "middle subject tokens": [3],
    }


def test_patching_is_the_written_out_version():
    tok = byte_tokenizer()
    facts = some()
    model = taught(make("gpt2", len(tok), layers=3, dtype=torch.float64), tok, facts)
    table = causal.patching(model, tok, facts, count=5, seed=2, max_tokens=60)
    hits = {}
    pairs = causal._partners(tok, facts, 5, 2)
    assert len(pairs) == 5 and all(one.target_true != other.target_true for one, other in pairs)
    for one, other in pairs:
        ids, source = (tok(fact.text)["input_ids"] for fact in (one, other))
        ends = [with_subject(tok, fact.prompt, fact.subject)[1] for fact in (one, other)]
        states = forward(model, source)[1]["state"]
        for layer in range(3):
            for position, (put, take) in {
                "subject": ends,
                "last": (len(ids) - 1, len(source) - 1),
            }.items():
                logits, _ = forward(model, ids, put={("state", layer): (put, states[layer][take])})
                hit = logits[-1].argmax().item() == target_ids(tok, other.target_true)[0]
                hits[position, layer] = hits.get((position, layer), 0) + hit
    states = table[table["position"] != "mlp"]
    assert {(row.position, row.layer): row.value for row in states.itertuples()} == {
        key: value / 5 for key, value in hits.items()
    }
    assert 0 < states["value"].mean() < 1 and set(table["n"]) == {5}


def test_the_last_state_carries_the_answer_and_the_subject_no_more(llama):
    model, tok = llama
    facts = some()
    model = taught(model, tok, facts)
    assert causal.known(model, tok, facts) == facts
    table = causal.patching(model, tok, facts).set_index(["position", "layer"])["value"]
    assert table["last", 3] == 1 and table["subject", 3] == 0
    assert table.equals(
        causal.patching(model, tok, facts).set_index(["position", "layer"])["value"]
    )


def test_one_error_names_the_record(gpt2):
    model, tok = gpt2
    with pytest.raises(ValueError, match="record a: no target_true"):
        causal.trace(
            model, tok, [Fact(case_id="a", subject="Orla", prompt="{} is", target_new="b")]
        )
    long = Fact(
        case_id="b",
        subject="Orla",
        prompt="{} is " + "in the river " * 40,
        target_new="Rome",
        target_true="Oslo",
        relation="P1",
    )
    for work in (causal.trace, causal.known):
        with pytest.raises(ValueError, match="record b: .* at most 64"):
            work(model, tok, [long])
    with pytest.raises(ValueError, match="record b: .* at most 64"):
        causal.patching(model, tok, [long, *some(2)])
    with pytest.raises(ValueError, match="no facts"):
        causal.trace(model, tok, [])
    ends = Fact(
        case_id="c",
        subject="Orla",
        prompt="It is {}",
        target_new="Rome",
        target_true="Oslo",
        relation="P1",
    )
    with pytest.raises(ValueError, match="none of 2 facts has a partner"):
        causal.patching(model, tok, [ends, some(1)[0]])


def test_margins_and_windows_of_mlps_are_the_written_out_version():
    tok = byte_tokenizer()
    facts = some()
    model = taught(make("gpt2", len(tok), layers=4, dtype=torch.float64), tok, facts)
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
