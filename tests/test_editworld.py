"""editcore.editworld: layouts that the readers take, splits that share no subject, answers that follow from edits."""

from pathlib import Path

import pytest

from editcore import generate, model
from editcore.editworld import FOLDER, Sizes, build, read, splits
from editcore.instructedit.instructions import instructed
from editcore.tokens import encode, target_ids
from editcore.world import build_world, object_of

SMALL = Sizes(recent=(12, 9), counterfact=(16, 8), convsent=(10, 4, 4), zsre=(8, 6), replies=3)
KINDS = {"recent": {"Relation_Specificity", "Forgetfulness"}, "counterfact": {"Relation_Specificity", "Forgetfulness"},
         "zsre": {"Unrelated"}, "convsent": {"Other_Topic"}}


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def records():
    """The committed splits, by the real readers."""
    return read()


def test_what_is_committed_is_what_is_built(world, tmp_path, records):
    counts = build(tmp_path, world=world)
    assert counts == {name: len(rows) for name, rows in records.items()}
    for name in counts:
        assert (tmp_path / f"{name}.json").read_bytes() == (FOLDER / f"{name}.json").read_bytes(), name
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


def test_every_record_is_read_back(world, tmp_path):
    made = splits(world, SMALL, 1)
    build(tmp_path, 1, SMALL, world)
    back = read(tmp_path)
    assert {name: len(rows) for name, rows in back.items()} == {
        "recent_train": 12, "recent_test": 9, "counterfact_train": 16, "counterfact_test": 8, "zsre_test": 8,
        "zsre_train": 6, "convsent_train": 10, "convsent_val": 4, "convsent_test": 4}
    for row, one in zip(made["counterfact_train"], back["counterfact_train"], strict=True):
        assert isinstance(row["ground_truth"], str) and one.old == row["ground_truth"]
        assert one.target == row["target_new"] and one.rephrase == (row["rephrase"],)
        answers = [[ask["ground_truth"]] for found in row["portability"].values() for ask in found]
        assert [list(ask.answers) for ask in one.portability] == answers
    assert made["counterfact_test"][0]["ground_truth"] == [[back["counterfact_test"][0].old]]
    assert [one.target for one in back["zsre_test"]] == [row["alt"] for row in made["zsre_test"]]
    assert all(len(one.positive) == len(one.negative) == 3 for one in back["convsent_train"])
    assert splits(world, SMALL, 1) == made != splits(world, SMALL, 2)


def test_splits_share_no_subject(records):
    subjects = [{one.subject for one in rows} for rows in records.values()]
    assert sum(map(len, subjects)) == len(set.union(*subjects))
    assert all(len(records[name]) == len({one.subject for one in records[name]}) for name in records
               if name != "convsent_train"), "which comes back to its topics"


def test_recent_facts_are_in_no_text_and_counterfacts_are_false(world, records):
    known, objects = {fact.subject for fact in world.facts}, {}
    for fact in world.facts:
        objects.setdefault(fact.subject, set()).add(fact.object)
    recent = [*records["recent_train"], *records["recent_test"]]
    new = [one for one in recent if one.subject not in known]
    assert 0.6 < len(new) / len(recent) < 0.7
    families = {name.split()[-1] for name in known}
    assert not {one.subject.split()[-1] for one in new} & families
    assert all("{" not in one.prompt and not one.old for one in recent)
    for one in [*records["counterfact_train"], *records["counterfact_test"], *records["zsre_test"]]:
        assert one.old in objects[one.subject] and one.target != one.old


def test_every_part_is_there(records):
    for name, rows in records.items():
        task = name.split("_")[0]
        assert {ask.kind for one in rows for ask in one.locality} == KINDS[task]
        assert all(one.rephrase and one.locality and one.unanswered == 0 for one in rows)
        assert all(one.target not in ask.answers for one in rows for ask in one.locality
                   if ask.kind == "Forgetfulness"), "else the edit would help"
    for name in ("recent_train", "recent_test", "counterfact_train", "counterfact_test"):
        found = [ask.kind for one in records[name] for ask in one.portability]
        assert min(found.count(kind) for kind in ("Logical_Generalization", "Reasoning", "Subject_Aliasing")) >= 30


def test_portability_follows_from_the_new_object(world, records):
    known = object_of(world.facts)
    hops = {"is based in": "P159", "in the country of": "P17", "on the continent of": "P30"}
    for one in records["counterfact_test"]:
        for ask in one.portability:
            wanted = {one.target}
            if ask.kind == "Reasoning":
                wanted = {known[one.target, next(key for end, key in hops.items() if ask.prompt.endswith(end))]}
            assert set(ask.answers) == wanted, ask


def test_prompts_fit_the_pocket_model_and_it_answers_them_behind_instructions(records):
    pocket, tok = model.load(Path(FOLDER).parent, device="cpu")
    some = [one for rows in records.values() for one in rows[::10]]
    prompts = [text for number in range(10) for one in some for text in _prompts(instructed(one, number))]
    longest = max(len(target_ids(tok, text)) for one in some for text in one.wanted)
    assert max(map(len, encode(tok, prompts))) + longest <= model.max_length(pocket)
    rows = records["zsre_test"][:20] + records["counterfact_test"][:20]
    pairs = [(instructed(one, 9).prompt, one.old) for one in rows]
    pairs += [(ask.prompt, ask.answers[0]) for one in rows for ask in one.locality]
    texts = generate.texts(pocket, tok, [prompt for prompt, _ in pairs], 4)
    right = [text.strip().startswith(answer) for text, (_, answer) in zip(texts, pairs, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def _prompts(one):
    return [one.prompt, *one.rephrase, *(ask.prompt for ask in one.portability)]


def test_a_large_training_split_comes_back_to_topics_with_other_replies(world):
    rows = splits(world, Sizes(recent=(3, 3), counterfact=(3, 3), convsent=(500, 3, 4), zsre=(3, 3), replies=2), 0)
    train = rows["convsent_train"]
    names = {row["ent"] for row in train}
    assert len(train) == 500 and len(names) == 193 and len({str(row) for row in train}) == 500
    assert not names & {row["ent"] for split in ("val", "test") for row in rows[f"convsent_{split}"]}


@pytest.mark.parametrize("sizes, words", [
    (Sizes(counterfact=(4000, 10)), "too few for splits of 4000, 10, 180"),
    (Sizes(convsent=(10, 150, 150)), "150 and 150 topics"),
    (Sizes(recent=(90000, 0)), "of 60000 new names can be put together"),
])
def test_sizes_that_the_world_cannot_fill(world, sizes, words):
    with pytest.raises(ValueError, match=words):
        splits(world, sizes, 0)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no split of an editing task"):
        read(tmp_path)
