"""Splits of the editing tasks: layouts that the readers take, disjoint subjects, right answers."""

from pathlib import Path

import pytest

from editcore import generate, model
from editcore.instructedit.instructions import add_instruction
from editcore.instructedit.records import read_records
from editcore.tokens import encode, target_ids
from editing_tasks import Sizes, build, splits
from world import build_world, object_of

FOLDER = Path(__file__).parents[2] / "data" / "pocket" / "editing"
SMALL = Sizes(recent=(12, 9), counterfact=(16, 8), convsent=(10, 4, 4), zsre=(8, 6), replies=3)
PLAIN = {"Relation_Specificity", "Forgetfulness"}
KINDS = {"recent": PLAIN, "counterfact": PLAIN, "zsre": {"Unrelated"}, "convsent": {"Other_Topic"}}


def read(folder):
    """{split: EditRecords} of a folder, by the real readers."""
    return {path.stem: read_records(path, path.stem.split("_")[0], seed=0)
            for path in sorted(folder.glob("*_*.json"))}


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def records():
    return read(FOLDER)


def test_what_is_committed_is_what_is_built(world, tmp_path, records):
    counts = build(tmp_path, world, Sizes())
    assert counts == {name: len(rows) for name, rows in records.items()}
    for name in counts:
        committed = (FOLDER / f"{name}.json").read_bytes()
        assert (tmp_path / f"{name}.json").read_bytes() == committed, name
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


def test_every_record_is_read_back(world, tmp_path):
    rows = splits(world, SMALL, 1)
    build(tmp_path, world, SMALL, seed=1)
    back = read(tmp_path)
    assert {name: len(group) for name, group in back.items()} == {
        "recent_train": 12, "recent_test": 9, "counterfact_train": 16, "counterfact_test": 8,
        "zsre_test": 8, "zsre_train": 6, "convsent_train": 10, "convsent_val": 4,
        "convsent_test": 4}
    for row, record in zip(rows["counterfact_train"], back["counterfact_train"], strict=True):
        assert isinstance(row["ground_truth"], str) and record.old == row["ground_truth"]
        assert record.target == row["target_new"] and record.rephrase == (row["rephrase"],)
        asks = [ask for group in row["portability"].values() for ask in group]
        answers = [list(ask.answers) for ask in record.portability]
        assert [[ask["ground_truth"]] for ask in asks] == answers
    assert rows["counterfact_test"][0]["ground_truth"] == [[back["counterfact_test"][0].old]]
    for row, record in zip(rows["zsre_test"], back["zsre_test"], strict=True):
        assert record.target == row["alt"]
    for record in back["convsent_train"]:
        assert len(record.positive) == len(record.negative) == 3
    assert splits(world, SMALL, 1) == rows != splits(world, SMALL, 2)


def test_splits_share_no_subject(records):
    subjects = {name: {record.subject for record in rows} for name, rows in records.items()}
    assert sum(map(len, subjects.values())) == len(set.union(*subjects.values()))
    for name, rows in records.items():
        if name != "convsent_train":    # comes back to its topics
            assert len(rows) == len(subjects[name])


def test_recent_facts_are_in_no_text_and_counterfacts_are_false(world, records):
    known = {fact.subject for fact in world.facts}
    true = {(fact.subject, fact.object) for fact in world.facts}
    recent = [*records["recent_train"], *records["recent_test"]]
    new = [record for record in recent if record.subject not in known]
    assert 0.6 < len(new) / len(recent) < 0.7
    families = {name.split()[-1] for name in known}
    assert not {record.subject.split()[-1] for record in new} & families
    assert all("{" not in record.prompt and not record.old for record in recent)
    for split in ("counterfact_train", "counterfact_test", "zsre_test"):
        for record in records[split]:
            assert (record.subject, record.old) in true and record.target != record.old


def test_every_part_is_there(records):
    for name, rows in records.items():
        locality = [(record, ask) for record in rows for ask in record.locality]
        assert {ask.kind for _, ask in locality} == KINDS[name.split("_")[0]]
        assert all(record.rephrase for record in rows)
        for record, ask in locality:    # else the edit would help
            assert ask.kind != "Forgetfulness" or record.target not in ask.answers
    for name in ("recent_train", "recent_test", "counterfact_train", "counterfact_test"):
        kinds = [ask.kind for record in records[name] for ask in record.portability]
        for kind in ("Logical_Generalization", "Reasoning", "Subject_Aliasing"):
            assert kinds.count(kind) >= 30


def test_portability_follows_from_the_new_object(world, records):
    known = object_of(world.facts)
    hops = {"is based in": "P159", "in the country of": "P17", "on the continent of": "P30"}
    for record in records["counterfact_test"]:
        for ask in record.portability:
            wanted = record.target
            if ask.kind == "Reasoning":
                relation = next(key for end, key in hops.items() if ask.prompt.endswith(end))
                wanted = known[record.target, relation]
            assert set(ask.answers) == {wanted}, ask


def test_prompts_fit_the_pocket_model_and_it_answers_them_behind_instructions(records):
    pocket, tok = model.load("pocket", device="cpu")
    sample = [record for rows in records.values() for record in rows[::10]]
    prompts = []
    for number in range(10):
        for record in (add_instruction(record, number) for record in sample):
            prompts += [record.prompt, *record.rephrase]
            prompts += [ask.prompt for ask in record.portability]
    longest = max(len(target_ids(tok, answer)) for record in sample for answer in record.wanted)
    assert max(map(len, encode(tok, prompts))) + longest <= model.max_length(pocket)
    rows = records["zsre_test"][:20] + records["counterfact_test"][:20]
    pairs = [(add_instruction(record, 9).prompt, record.old) for record in rows]
    pairs += [(ask.prompt, ask.answers[0]) for record in rows for ask in record.locality]
    texts = generate.texts(pocket, tok, [prompt for prompt, _ in pairs], 4)
    right = [answer.strip().startswith(old) for answer, (_, old) in zip(texts, pairs, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def test_a_large_training_split_comes_back_to_topics_with_other_replies(world):
    sizes = Sizes(recent=(3, 3), counterfact=(3, 3), convsent=(500, 3, 4), zsre=(3, 3), replies=2)
    rows = splits(world, sizes, 0)
    train = rows["convsent_train"]
    names = {row["ent"] for row in train}
    assert len(train) == len({str(row) for row in train}) == 500 and len(names) == 193
    held_out = [*rows["convsent_val"], *rows["convsent_test"]]
    assert not names & {row["ent"] for row in held_out}


@pytest.mark.parametrize("sizes, words", [
    (Sizes(counterfact=(4000, 10)), "too few for splits of 4000, 10, 180"),
    (Sizes(convsent=(10, 150, 150)), "150 and 150 topics"),
    (Sizes(recent=(90000, 0)), "of 60000 new names can be put together")])
def test_sizes_that_the_world_cannot_fill(world, sizes, words):
    with pytest.raises(ValueError, match=words):
        splits(world, sizes, 0)
