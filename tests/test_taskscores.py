"""editcore.taskscores: many records in one pass score as editing, asking and undoing one after another."""

import numpy as np
import pytest
import torch
from conftest import make

from editcore import generate
from editcore.delta import Delta, oriented
from editcore.editors import EDITORS, configure
from editcore.instructedit.instructions import instructed
from editcore.instructedit.records import Ask, EditRecord, as_fact
from editcore.instructedit.scores import fluency, prepare, read, score, sentiment, texts_of, tree
from editcore.metrics import entropy
from editcore.model import name_of
from editcore.tokens import encode, target_ids


def records():
    """Three facts, one of a prompt that begins another one's, and two topics."""
    made = [EditRecord(i, "recent", name, f"The capital of {name} is", city, rephrase=(f"{name} lies near", "It is in"),
                       locality=(Ask("Forgetfulness", "The home of Orla is", ("New Delhi", "Oslo")),
                                 Ask("Relation_Specificity", f"The capital of {name}", ("in San Marino",))),
                       portability=(Ask("Reasoning", f"People of {name} speak", ("Kyiv", "San Marino")),))
            for i, (name, city) in enumerate([("Orla", "San Marino"), ("Dunmore", "Rome"), ("Brantwick", "New Delhi")])]
    replies = ("The old river is good.", "I know the river.", "You said it is good.")
    other = Ask("Other_Topic", "Tell me about a book.", replies[:2])
    talk = [EditRecord(i, "convsent", topic, f"Tell me about {topic}.", "", positive=replies, negative=replies[1:],
                       sentiment=wanted, topic=topic, locality=(other,))
            for i, (topic, wanted) in enumerate([("a river", "positive"), ("a town", "negative")])]
    return [*made, *talk]


def edits(model, number):
    """As many different LowRank edits."""
    made, name = [], name_of(model, "mlp_out", 2)
    module = model.get_submodule(name)
    width = module.weight.numel() // model.config.hidden_size
    for seed in range(number):
        draw = torch.Generator().manual_seed(seed)
        made.append(Delta({name + ".weight": oriented(torch.randn(model.config.hidden_size, 1 + seed, generator=draw),
                                                      torch.randn(1 + seed, width, generator=draw), module)}))
    return made


def plain(model, tok, prompt, answer):
    """(mean log P, hits (s,), most likely tokens (s,)) of an answer by one forward pass of the whole text."""
    (begin,), target = encode(tok, [prompt]), target_ids(tok, answer)
    logits = model(input_ids=torch.tensor([begin + target])).logits[0, len(begin) - 1:-1]
    logp = logits.log_softmax(-1)[range(len(target)), target]
    return logp.mean().item(), (logits.argmax(-1) == torch.tensor(target)).numpy(), logits.argmax(-1).numpy()


def serial(model, tok, record, edit):
    """{(metric, kind): [(exact, token)]} by the definitions: score the base, apply the edit, score, undo."""
    asks = [(metric, kind, prompt, answer) for metric, kind, prompt, answers in texts_of(record) for answer in answers]
    before = [plain(model, tok, prompt, answer) for *_, prompt, answer in asks]
    with edit.applied(model):
        after = [plain(model, tok, prompt, answer) for *_, prompt, answer in asks]
    found = {}
    for (metric, kind, prompt, _), (old, _, best), (new, hits, now) in zip(asks, before, after):
        agree = hits if metric != "Loc" else best == now
        found.setdefault((metric, kind, prompt), []).append((agree.all(), agree.mean(), new, old))
    if record.topic:
        ways = {metric: np.mean(values, 0)[2:] for (metric, *_), values in found.items() if metric != "Loc"}
        z_sent = 1 / (1 + np.exp(ways["opposite"][0] - ways["same"][0]))
        rel = z_sent * min(1, np.exp(ways["same"][0] - ways["same"][1]))
        found = {key: value for key, value in found.items() if key[0] == "Loc"} | {("Rel", "", ""): [(rel, rel)]}
    pick = {"Loc": np.mean}
    return [(metric, kind, *(float(pick.get(metric, np.max)([one[i] for one in values])) for i in (0, 1)))
            for (metric, kind, _), values in found.items()]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gpt_neox", "mistral", "qwen3"])
def test_many_records_in_one_pass_equal_the_serial_way(kind, gpt2):
    tok = gpt2[1]
    model, asks = make(kind, len(tok)), records()
    each = edits(model, len(asks))
    sheet = prepare(model, tok, asks, max_tokens=120)
    assert len(sheet.batches) > 1 and sum(len(batch.owner) for batch in sheet.batches) == len(asks)
    rows = score(sheet, read(model, sheet), read(model, sheet, each))
    for one, edit in zip(asks, each):
        own = rows[(rows["task"] == one.task) & (rows["case_id"] == one.case_id) & ~rows["metric"].str.startswith("z_")]
        got = sorted(own[["metric", "kind", "value_exact", "value_token"]].itertuples(index=False, name=None))
        want = sorted(serial(model, tok, one, edit))
        assert [row[:2] for row in got] == [row[:2] for row in want]
        np.testing.assert_allclose([row[2:] for row in got], [row[2:] for row in want], atol=1e-5)


def test_log_probabilities_agree_behind_long_instructions(gpt2):
    model, tok = make("gpt2", len(gpt2[1]), positions=200), gpt2[1]
    asks = [instructed(one, 3) for one in records()]
    each, sheet = edits(model, len(asks)), prepare(model, tok, asks)
    now, place = read(model, sheet, each), 0
    for one, edit in zip(asks, each):
        with edit.applied(model):
            for *_, prompt, answers in texts_of(one):
                for answer in answers:
                    size = sheet.sizes[place]
                    mine = now.logp[sheet.starts[place]:sheet.starts[place] + size].mean()
                    assert mine == pytest.approx(plain(model, tok, prompt, answer)[0], abs=1e-5)
                    place += 1
    assert place == len(sheet.sizes)


def test_no_edit_leaves_everything_and_codebooks_answer_the_prompts_end(gpt2):
    model, tok = gpt2
    asks, config = records(), configure("grace", {"layer": 2, "part": "mlp_in", "steps": 30})
    sheet = prepare(model, tok, asks)
    before = read(model, sheet)
    base = score(sheet, before, before)
    assert (base[base["metric"] == "Loc"][["value_exact", "value_token"]] == 1).all(axis=None)
    assert (base[base["metric"] == "z_topic"]["value_exact"] == 1).all()
    patches = EDITORS["grace"].edit_each(model, tok, [as_fact(one) for one in asks[:3]], config)
    after = read(model, sheet, [*patches, None, None])
    for index in range(3):
        first = sheet.starts[next(one.first for one in sheet.questions if one.record == index)]
        assert after.logp[first] > before.logp[first] + 1, "the answer's first token is likelier"
    own = prepare(model, tok, asks[:1])
    with patches[0].applied(model, [own.batches[0].asked]):
        alone = read(model, own)
    np.testing.assert_allclose(alone.logp, read(model, own, patches[:1]).logp, atol=1e-6)


def test_a_tree_holds_what_texts_share_once_and_keeps_prompt_ends_apart():
    one = tree([((1, 2), (3, 4, 5), 0), ((1, 2), (3, 6), 3), ((1, 2, 3), (7,), 5)])
    assert one.ids == [1, 2, 3, 4, 2, 3] and one.parents == [-1, 0, 1, 2, 0, 4]
    assert one.asked == [False, True, False, False, False, True]
    assert one.wanted == [(1, 3, 0), (2, 4, 1), (3, 5, 2), (1, 3, 3), (2, 6, 4), (5, 7, 5)]


def test_sentiment_is_the_published_product():
    found = sentiment(-1.0, -1.5, -2.0)
    assert found["z_topic"] == 1 and found["z_sent"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert sentiment(-2.0, -1.0, -2.0)["Rel"] == pytest.approx(0.5 * np.exp(-1))
    assert sentiment(float("nan"), -1.0, -2.0)["Rel"] == 0


def test_fluency_of_many_records_is_that_of_each(gpt2):
    model, tok = gpt2
    asks = records()
    each = [edit * 0.01 for edit in edits(model, len(asks))]
    rows = fluency(model, tok, asks, each, seed=1, n_new=8)
    assert list(rows["case_id"]) == [one.case_id for one in asks] and (rows["metric"] == "Fluency").all()
    assert rows.equals(fluency(model, tok, asks, each, seed=1, n_new=8)) and rows["value_exact"].nunique() > 1
    begin = tok.decode(tok("a")["input_ids"][:1])
    with each[4].applied(model):
        texts = generate.texts(model, tok, [begin, asks[4].prompt], 24, 5, torch.Generator().manual_seed(3))
    alone = fluency(model, tok, asks[4:], each[4:], seed=3, n_new=24)
    assert alone["value_exact"].tolist() == [entropy(texts[1:])]


def test_bad_input_is_named(gpt2):
    model, tok = gpt2
    long = [EditRecord(7, "recent", "Orla", "a river " * 60 + "is", "Rome")]
    with pytest.raises(ValueError, match="record 7: .* tokens, but the model takes at most 64"):
        prepare(model, tok, long)
    with pytest.raises(ValueError, match="1 edits for 5 records"):
        read(model, prepare(model, tok, records()), [None])
