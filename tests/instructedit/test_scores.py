"""Scores: many records in a pass score as edited, asked, undone one by one; cases are cached."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make

from editcore import generate
from editcore.delta import Delta, oriented
from editcore.editors import EDITORS, configure
from editcore.hooks import hooked
from editcore.instructedit import scores, trained_editors
from editcore.instructedit.batched_edits import lowest_block
from editcore.instructedit.questions import enter, prepare, questions_of, read
from editcore.instructedit.records import Ask, EditRecord, record_as_fact
from editcore.instructedit.scores import Case, entropies, evaluate, score
from editcore.metrics import entropy
from editcore.model import load, name_of
from editcore.tokens import encode, target_ids

FT = (("epsilon", 0.5), ("layer", 1), ("lr", 0.05), ("steps", 12))


def some_records():
    """Three facts, one of a prompt that begins another one's, and two topics."""
    facts = [EditRecord(i, "recent", name, f"The capital of {name} is", city,
                        rephrase=(f"{name} lies near", "It is in"),
                        locality=(Ask("Forgetfulness", "The home of Orla is",
                                      ("New Delhi", "Oslo")),
                                  Ask("Relation_Specificity", f"The capital of {name}",
                                      ("in San Marino",))),
                        portability=(Ask("Reasoning", f"People of {name} speak",
                                         ("Kyiv", "San Marino")),))
             for i, (name, city) in enumerate([("Orla", "San Marino"), ("Dunmore", "Rome"),
                                               ("Brantwick", "New Delhi")])]
    replies = ("The old river is good.", "I know the river.", "You said it is good.")
    other = Ask("Other_Topic", "Tell me about a book.", replies[:2])
    talk = [EditRecord(i, "convsent", topic, f"Tell me about {topic}.", "", positive=replies,
                       negative=replies[1:],
                       sentiment=wanted, topic=topic, locality=(other,))
            for i, (topic, wanted) in enumerate([("a river", "positive"), ("a town", "negative")])]
    return [*facts, *talk]


def some_edits(model, number):
    """As many different LowRank edits."""
    name = name_of(model, "mlp_out", 2)
    module, made = model.get_submodule(name), []
    width = module.weight.numel() // model.config.hidden_size
    for seed in range(number):
        draw = torch.Generator().manual_seed(seed)
        left = torch.randn(model.config.hidden_size, 1 + seed, generator=draw)
        made.append(Delta({name + ".weight": oriented(left,
                                                      torch.randn(1 + seed, width, generator=draw),
                                                      module)}))
    return made


def plain(model, tok, prompt, answer):
    """(mean log P, hits (s,), most likely tokens (s,)) of an answer by one pass of the text."""
    (begin,), target = encode(tok, [prompt]), target_ids(tok, answer)
    logits = model(input_ids=torch.tensor([begin + target])).logits[0, len(begin) - 1:-1]
    logp = logits.log_softmax(-1)[range(len(target)), target]
    best = logits.argmax(-1)
    return logp.mean().item(), (best == torch.tensor(target)).numpy(), best.numpy()


def serial(model, tok, record, edit):
    """{metric: (exact, token)} by the definitions: score the base, apply the edit, score, undo."""
    asks = [(metric, prompt, answer) for metric, prompt, answers in questions_of(record)
            for answer in answers]
    before = [plain(model, tok, prompt, answer) for _, prompt, answer in asks]
    with edit.applied(model):
        after = [plain(model, tok, prompt, answer) for _, prompt, answer in asks]
    rows = []
    for (metric, prompt, _), (old, _, best), (new, hits, now) in zip(asks, before, after):
        agree = hits if metric != "Loc" else best == now
        rows.append((metric, prompt, agree.all(), agree.mean(), new, old))
    table = pd.DataFrame(rows, columns=["metric", "prompt", "exact", "token", "new", "old"]).astype(
        {"exact": float})
    each = table.groupby(["metric", "prompt"])[["exact", "token", "new", "old"]]
    best = each.max()
    best.loc["Loc"] = each.mean().loc["Loc"].to_numpy()
    found = best.groupby("metric")[["exact", "token"]].mean()
    if record.topic:
        means = table.groupby("metric")[["new", "old"]].mean()
        z_sent = 1 / (1 + np.exp(means.new["opposite"] - means.new["same"]))
        rel = z_sent * min(1, np.exp(means.new["same"] - means.old["same"]))
        found = found.drop(index=["same", "opposite"])
        found.loc["Rel"] = (rel, rel)
    return found.sort_index()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gpt_neox", "mistral", "qwen3"])
def test_many_records_in_one_pass_equal_the_serial_way(kind, gpt2):
    tok = gpt2[1]
    model, records = make(kind, len(tok)), some_records()
    edits = some_edits(model, len(records))
    batch = prepare(model, tok, records, max_tokens=120)
    assert len(batch.passes) > 1 and sum(len(owner) for owner, *_ in batch.passes) == len(records)
    rows = score(batch, read(model, batch), read(model, batch, edits))
    for record, edit in zip(records, edits):
        got = rows[(rows["task"] == record.task) & (rows["case_id"] == record.case_id)]
        got = got[~got["metric"].str.startswith("z_")].set_index("metric")
        got = got[["exact", "token"]].sort_index()
        want = serial(model, tok, record, edit)
        pd.testing.assert_frame_equal(got, want, check_names=False, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_blocks_above_alone_answer_as_all_do(kind, gpt2):
    tok = gpt2[1]
    model, records = make(kind, len(tok)), some_records()
    edits = [None, *some_edits(model, len(records))[1:]]
    batch = prepare(model, tok, records, max_tokens=120)
    whole = read(model, batch, edits)
    for layer in range(lowest_block(model, edits) + 1):
        part = read(model, batch, edits, enter(model, batch, layer))
        np.testing.assert_allclose(part.logp, whole.logp, atol=1e-5)
        assert (part.best == whole.best).all()


def test_no_edit_leaves_everything_and_codebooks_answer_the_prompts_end(gpt2):
    model, tok = gpt2
    records, config = some_records(), configure("grace",
                                                {"layer": 2, "part": "mlp_in", "steps": 30})
    batch = prepare(model, tok, records)
    before = read(model, batch)
    base = score(batch, before, before).set_index("metric")
    assert (base.loc["Loc", ["exact", "token"]] == 1).all(axis=None)
    assert (base.loc["z_topic", "exact"] == 1).all()
    patches = EDITORS["grace"].edit_each(model, tok,
                                         [record_as_fact(record) for record in records[:3]], config)
    after = read(model, batch, [*patches, None, None])
    for index in range(3):
        first = batch.starts[batch.questions.set_index("record").loc[index, "first"].iloc[0]]
        assert after.logp[first] > before.logp[first] + 1, "the answer's first token is likelier"
    single = prepare(model, tok, records[:1])
    mask = single.passes[0][1].ends_prompt
    hooks = {name: lambda _, args, y, part=part: part.output(args[0], y, mask)
             for name, part in patches[0].parts.items()}
    with hooked(model, hooks):
        alone = read(model, single)
    np.testing.assert_allclose(alone.logp, read(model, single, patches[:1]).logp, atol=1e-6)


def test_texts_of_many_records_are_those_of_each(gpt2):
    model, tok = gpt2
    prompts = [record.prompt for record in some_records()]
    edits = [edit * 0.01 for edit in some_edits(model, len(prompts))]
    values = entropies(model, tok, prompts, edits, 8, seed=1)
    assert len(set(values)) > 1
    assert values == entropies(model, tok, prompts, edits, 8, seed=1)
    begin = tok.decode(tok("a")["input_ids"][:1])
    with edits[4].applied(model):
        texts = generate.texts(model, tok, [begin, prompts[4]], 24, top_k=5,
                               generator=torch.Generator().manual_seed(3))
    assert entropies(model, tok, prompts[4:], edits[4:], 24, seed=3) == [entropy(texts[1:])]


def test_texts_that_need_several_passes(gpt2, monkeypatch):
    model, tok = gpt2
    prompts = [record.prompt for record in some_records()]
    sampled = []
    monkeypatch.setattr(scores.generate, "texts",
                        lambda model, tok, prompts, *_, **__: sampled.append(prompts) or prompts)
    monkeypatch.setattr(scores, "ROOM", 70)
    values = entropies(model, tok, prompts, [None] * len(prompts), 8)
    assert values == [entropy([prompt]) for prompt in prompts]
    assert len(sampled) > 1 and sorted(sum((part[1:] for part in sampled), [])) == sorted(prompts)


def test_fluency_is_scored_and_kept(tiny, tmp_path, monkeypatch):
    config = trained_editors.make_config(model=tiny, examples=4)
    asked = [case(), case(editor="Mine", key="", settings=(), network=config)]
    folders = {"out_dir": tmp_path / "scores", "editors": tmp_path}
    rows = scores.fluency(asked, tiny, n_new=6, **folders)
    assert list(rows["editor"]) == ["FT-L"] * 3 + ["Mine"] * 3
    assert set(rows["metric"]) == {"Fluency"} and (rows["value"] > 0).all()
    model, tok = load(tiny)
    edits = scores.edits_of(model, tok, asked[1], asked[1].records, tiny, tmp_path)
    prompts = [record.prompt for record in scores.as_asked(asked[1])]
    mine = entropies(model, tok, prompts, edits, 6)
    assert rows.query("editor == 'Mine'")["value"].tolist() == mine
    monkeypatch.setattr(scores, "load", None)       # all is read
    assert scores.fluency(asked, tiny, n_new=6, **folders).equals(rows)


# Cases ----------------------------------------------------------------------------------------

def case(**words):
    """FT-L on three facts."""
    return Case(**{"editor": "FT-L", "records": tuple(some_records()[:3]), "key": "ft",
                   "settings": FT} | words)


def mend_config(model):
    """A small MEND with instructions."""
    return trained_editors.make_config(model=model, tasks=("recent",), examples=4, seed=5,
                                       settings={"layers": (1, 2), "rank": 4, "every": 4})


def test_each_record_is_scored_after_its_own_edit(tiny, tmp_path):
    model, tok = load(tiny)
    rows = evaluate([case(), case(editor="Base", key="", settings=())], tiny, out_dir=tmp_path)
    want = []
    for record in some_records()[:3]:
        batch = prepare(model, tok, [record])
        (edit,) = scores.edits_of(model, tok, case(), [record], tiny)
        before = read(model, batch)
        with edit.applied(model):
            want.append(score(batch, before, read(model, batch)))
    got = rows[rows["editor"] == "FT-L"]
    pd.testing.assert_frame_equal(got[["task", "case_id", "metric", "exact", "token"]],
                                  pd.concat(want, ignore_index=True), atol=1e-5)
    shown = got["token"].where(got["metric"].isin(["Loc", "Port"]), got["exact"])
    assert (got["value"] == shown).all() and (rows["seed"] == -1).all()
    means = rows.groupby(["editor", "metric"])["exact"].mean()
    assert means["FT-L", "Rel"] > 0.5 and means["Base", "Rel"] == 0 and means["Base", "Loc"] == 1


def test_what_was_learned_together_is_asked_of_all(tiny, tmp_path):
    model, tok = load(tiny)
    both = case(together=tuple(some_records()[:2]))
    rows = evaluate([both, replace(both, records=both.records[:1])], tiny, out_dir=tmp_path)
    config = configure("ft", dict(FT), tiny)
    edit = EDITORS["ft"].edit(model, tok, [record_as_fact(record) for record in both.together],
                              config)
    batch = prepare(model, tok, both.records)
    before = read(model, batch)
    with edit.applied(model):
        want = score(batch, before, read(model, batch))
    pd.testing.assert_frame_equal(rows[["task", "case_id", "metric", "exact", "token"]][:len(want)],
                                  want, atol=1e-5)


def test_cases_are_cached_by_what_they_depend_on(tiny, tmp_path, monkeypatch):
    cases = [case(), case(editor="b", key="", settings=()),
             case(editor="c", together=tuple(some_records()[:1]))]
    first = evaluate(cases, tiny, out_dir=tmp_path)
    assert list(first["editor"].unique()) == ["FT-L", "b",
                                              "c"] and len(list(tmp_path.glob("*.parquet"))) == 3
    monkeypatch.setattr(scores, "read", None)
    again = evaluate([replace(one, editor=one.editor + "!") for one in cases], tiny,
                     out_dir=tmp_path)
    pd.testing.assert_frame_equal(first.drop(columns="editor"), again.drop(columns="editor"))
    others = [case(records=tuple(some_records()[1:3])), case(seed=1), case(style="full"),
              case(settings=FT[:3]),
              case(question_style="full"), case(together=tuple(some_records()[1:2])),
              case(style="full", description=3)]
    ids = {scores.identifier(one, tiny) for one in [*cases, *others]}
    assert len(ids) == len(cases) + len(others)


def test_sizes_multiply_edits_that_are_made_once(tiny, tmp_path, monkeypatch):
    (one,) = scores.cases([("Mine", mend_config(tiny))], {"recent": some_records()[:3]})
    monkeypatch.setattr(scores, "AT_ONCE", 2)
    made = []
    edits_of = scores.edits_of
    monkeypatch.setattr(scores, "edits_of",
                        lambda *args, **words: made.append(1) or edits_of(*args, **words))
    folders = {"out_dir": tmp_path, "editors": tmp_path}
    rows = evaluate([*scores.at_sizes([one], (0, 1, 3)), case()], tiny, **folders)
    assert len(made) == 4, "two parts, two editors"
    assert list(rows["size"].unique()) == [0, 1, 3]
    assert scores.identifier(one, tiny, tmp_path) == scores.identifier(
        replace(one, size=1.0), tiny, tmp_path)
    still = rows[(rows["size"] == 0) & (rows["metric"] == "Loc")]
    assert (still["value"] == 1).all()
    model, tok = load(tiny)
    batch = prepare(model, tok, scores.as_asked(one))
    edits = [edit * 3 for edit in edits_of(model, tok, one, one.records, tiny, tmp_path)]
    want = score(batch, read(model, batch), read(model, batch, edits))
    got = rows[rows["size"] == 3]
    np.testing.assert_allclose(got["token"], want["token"], atol=1e-5)
    for bad in (case(key="grace", settings=(("layer", 1), ("part", "mlp_in"))),
                case(key="", settings=())):
        with pytest.raises(ValueError, match="size is 2.0, but must be 1"):
            evaluate(scores.at_sizes([bad], [2]), tiny, **folders)


def test_scoring_that_was_stopped_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "AT_ONCE", 2)
    whole = evaluate([case()], tiny, out_dir=tmp_path / "whole")
    seen = []

    def fails_once(*args, **words):
        seen.append(1)
        if len(seen) == 3:      # the unedited and the edited model answer each part
            raise KeyboardInterrupt
        return read(*args, **words)

    monkeypatch.setattr(scores, "read", fails_once)
    with pytest.raises(KeyboardInterrupt):
        evaluate([case()], tiny, out_dir=tmp_path)
    pd.testing.assert_frame_equal(evaluate([case()], tiny, out_dir=tmp_path), whole)
    assert len(seen) == 5
    assert [path.suffix for path in tmp_path.glob("ft*")] == [".parquet"]


def test_a_trained_editor_brings_its_instructions(tiny, tmp_path):
    (one,) = scores.cases([("Mine", mend_config(tiny))], {"recent": some_records()[:2]})
    rows = evaluate([one, replace(one, style="none", editor="bare")], tiny, out_dir=tmp_path,
                    editors=tmp_path)
    assert set(rows["seed"]) == {5} and set(rows["editor"]) == {"Mine", "bare"}
    asked = scores.as_asked(one)
    assert all(record.prompt.startswith("Task: Recent\nDescription: ") for record in asked)
    model, tok = load(tiny)
    edit, _ = scores.edits_of(model, tok, one, one.records, tiny, tmp_path)
    batch = prepare(model, tok, asked[:1])
    want = score(batch, read(model, batch), read(model, batch, [edit]))
    got = rows[(rows["editor"] == "Mine") & (rows["case_id"] == 0)]
    np.testing.assert_allclose(got["token"], want["token"], atol=1e-5)


def test_the_main_table(tiny):
    editors = trained_editors.main_editors(tiny, seeds=(0, 1), examples=4)
    tests = {"recent": some_records()[:2], "convsent": some_records()[3:],
             "zsre": [replace(some_records()[0], task="zsre")]}
    cases = scores.main_cases(editors, tests, settings={"ft": {"steps": 2}})
    names = {case.editor for case in cases}
    assert names == {"Base model", "Base model (instructed)", "FT-L", "CaliNet", "GRACE",
                     "InstructEdit", "MEND",
                     "KE", "FT-L (fair)", "CaliNet (fair)", "GRACE (fair)"}
    of = {(case.editor, case.records[0].task, case.network.seed if case.network else 0): case
          for case in cases}
    assert {case.seed for case in cases} == {0}     # trainings of an editor are asked the same
    learned = tuple(tests["recent"] + tests["convsent"])
    assert of["FT-L", "recent", 0].together == () and of["FT-L", "zsre", 0].together == learned
    assert of["FT-L (fair)", "zsre", 0].together == () and of["GRACE", "zsre",
                                                              0].together == learned
    assert of["CaliNet", "recent", 0].together == learned
    assert of["CaliNet (fair)", "zsre", 0].together == tuple(tests["zsre"])
    assert of["InstructEdit", "zsre", 1].network.seed == 1 and of["FT-L", "recent",
                                                                  0].settings == (("steps", 2),)
    few = {task: records[:1] for task, records in tests.items()}
    some = scores.main_cases(editors, tests, few, settings={"ft": {"steps": 2}})
    assert [case for case in some if not case.key] == [
        case for case in scores.main_cases(editors, tests) if not case.key]
    assert [case for case in some if case.key] == [
        case for case in scores.main_cases(editors, few, settings={"ft": {"steps": 2}}) if case.key]


def test_bad_input_is_named(gpt2, tiny):
    model, tok = gpt2
    long = [EditRecord(7, "recent", "Orla", "a river " * 60 + "is", "Rome")]
    with pytest.raises(ValueError, match="record 7: .* tokens, but the model takes at most 64"):
        prepare(model, tok, long)
    with pytest.raises(ValueError, match="1 edits for 5 records"):
        read(model, prepare(model, tok, some_records()), [None])
    config = trained_editors.make_config(model=tiny, examples=4)
    for words, message in (({"records": ()}, "there are no records"),
                           ({"key": "fft"}, "unknown editor 'fft'"),
                           ({"settings": (("speed", 1),)}, "no setting 'speed'"),
                           ({"style": "loud"}, "unknown style 'loud'"),
                           ({"description": 10}, "descriptions 0 to 9")):
        with pytest.raises(ValueError, match=message):
            evaluate([case(**{"style": "full"} | words)], tiny, out_dir="nowhere")
    with pytest.raises(ValueError, match="key 'ft' and a network"):
        scores._editor(case(network=config), tiny, "")
