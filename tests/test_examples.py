"""editcore.examples: what an example holds, read back as text; nothing of a record is asked with the wrong frame."""

from dataclasses import replace

import pytest

from editcore.editors import configure
from editcore.instructedit import examples, hyperloss, instructions, ke, mend
from editcore.instructedit.records import Ask, EditRecord

FACT = EditRecord(7, "counterfact", "Orla", "The home of Orla is", "Rome", "Paris",
                  rephrase=("Orla is located in", "Orla lies near"),
                  locality=(Ask("Forgetfulness", "The capital of Dunmore is", ("Oslo", "Bern")),
                            Ask("Relation_Specificity", "Orla was born in", ("Lima",))),
                  portability=(Ask("Reasoning", "The river of Orla is", ("Turin",)),))
TALK = EditRecord(3, "convsent", "a book", "What of a book?", "", positive=("good", "very good", "read it", "go on"),
                  negative=("bad", "very bad", "no"), sentiment="negative", topic="a book",
                  locality=(Ask("Other_Topic", "What of a river?", ("wet", "dry", "old", "new")),))


def frame(prompt):
    return f"Input: {prompt}"


def read(tok, part):
    """The texts of (prompt ids, target ids) pairs."""
    return [(tok.decode(prompt), tok.decode(target).strip()) for prompt, target in part]


def test_a_fact_is_edited_and_asked_behind_its_instruction_and_locality_is_not(gpt2):
    tok = gpt2[1]
    made = examples.of(tok, FACT, frame)
    assert made.name == "counterfact 7" and made.against == () and made.condition == ()
    assert read(tok, made.edit) == read(tok, made.after) == [("Input: The home of Orla is", "Rome")]
    assert read(tok, made.locality) == [("The capital of Dunmore is", "Oslo"), ("Orla was born in", "Lima")]
    again = examples.of(tok, FACT, frame, after="rephrase")
    assert read(tok, again.after) == [("Input: Orla is located in", "Rome"), ("Input: Orla lies near", "Rome")]
    bare = replace(FACT, rephrase=(), locality=())
    assert examples.of(tok, bare, frame, after="rephrase") == replace(made, locality=())
    assert read(tok, examples.of(tok, FACT).edit) == [("The home of Orla is", "Rome")]
    put = instructions.prefix(FACT, 2, "full")
    assert read(tok, examples.of(tok, FACT, put).edit) == [(instructions.prefixed(FACT, 2), "Rome")]


@pytest.mark.parametrize("seed", range(4))
def test_replies_of_a_topic_are_split_into_taught_wanted_and_unwanted(seed, gpt2):
    tok = gpt2[1]
    made = examples.of(tok, TALK, frame, replies=2, seed=seed)
    (prompt, taught), = read(tok, made.edit)
    after, against, stay = (read(tok, part) for part in (made.after, made.against, made.locality))
    assert taught == examples.target(TALK, seed) and taught in TALK.negative
    assert {reply for _, reply in after} == set(TALK.negative) - {taught}
    assert len(against) == 2 and {reply for _, reply in against} < set(TALK.positive)
    assert {text for text, _ in after + against} == {prompt} == {"Input: What of a book?"}
    assert len(stay) == 2 and {text for text, _ in stay} == {"What of a river?"}
    assert made == examples.of(tok, TALK, frame, replies=2, seed=seed)
    lone = replace(TALK, negative=("bad",))
    assert read(tok, examples.of(tok, lone).after) == [("What of a book?", "bad")]


def test_what_is_drawn_depends_on_the_seed(gpt2):
    assert len({str(examples.of(gpt2[1], TALK, replies=1, seed=seed)) for seed in range(8)}) > 4
    assert {examples.target(TALK, seed) for seed in range(20)} == set(TALK.negative)


def test_an_example_can_be_laid_and_its_fact_is_the_same_edit(gpt2):
    model, tok = gpt2
    network = mend.start(model, configure("mend", {"network": "untrained", "layers": (-2, -1), "rank": 4}))
    for record in (FACT, TALK, replace(FACT, locality=())):
        example, fact = examples.of(tok, record, frame), examples.asked(record, frame)
        assert hyperloss.lay(model, network, example).counts == tuple(
            len(getattr(example, part)) for part in ("after", "against", "locality"))
        assert read(tok, example.edit) == [(fact.text, fact.target_new)]
    assert examples.asked(FACT, frame).target_true == "Paris" and fact.case_id == 7
    ids = ke.conditions(model, tok, [examples.asked(one, frame) for one in (FACT, TALK)])
    assert tok.decode(ids[0]) == "Paris >> Rome || Input: The home of Orla is"
    assert tok.decode(ids[1]).endswith(f">> {examples.target(TALK)} || Input: What of a book?")


def test_bad_input_is_named(gpt2, llama):
    tok = gpt2[1]
    with pytest.raises(ValueError, match="after is 'all', but must be one of edit, rephrase"):
        examples.of(tok, FACT, after="all")
    odd = replace(FACT, target="Zürich\x00 \ufffd", task="recent")
    with pytest.raises(ValueError, match="recent record 7: target 'Zürich"):
        examples.of(llama[1], odd)
