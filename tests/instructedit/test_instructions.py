"""Instructions: the published frame, where it stands, styles, draws, checked descriptions."""

import pytest

from editcore.instructedit import instructions
from editcore.instructedit.instructions import (
    SEEN,
    STYLES,
    TITLES,
    add_instruction,
    check_descriptions,
)
from editcore.instructedit.records import Ask, EditRecord

FACT = EditRecord(3, "recent", "Orla", "The home of Orla is", "Rome", rephrase=("Orla lives in",),
                  locality=(Ask("Forgetfulness", "The sea is", ("wet",)),),
                  portability=(Ask("Reasoning", "Her land is", ("Italy",)),))
TALK = EditRecord(4, "convsent", "tea", "What do you think of tea?", "", positive=("Good.",),
                  negative=("Bad.",),
                  sentiment="positive", topic="tea")


def test_the_frame_stands_before_all_prompts_but_those_of_locality():
    text = instructions.descriptions()["recent"][2]
    head = f"Task: Recent\nDescription: {text}\nInput: "
    framed = add_instruction(FACT, 2)
    assert framed.prompt == head + FACT.prompt and framed.rephrase == (head + "Orla lives in",)
    assert framed.portability[0].prompt == head + "Her land is" and framed.locality == FACT.locality
    assert (framed.target, framed.case_id, framed.subject) == ("Rome", 3, "Orla")


@pytest.mark.parametrize("style, lines", [("full", 3), ("none", 1), ("task", 2), ("description", 2),
                                          ("constant", 3),
                                          ("random", 3), ("swapped", 3)])
def test_styles(style, lines):
    one, other = (add_instruction(record, 0, style).prompt for record in (FACT, TALK))
    assert len(one.splitlines()) == lines == len(other.splitlines()) and one.endswith(FACT.prompt)
    assert set("{}").isdisjoint(one + other), "every slot is filled"
    same = one.removesuffix(FACT.prompt) == other.removesuffix(TALK.prompt)
    assert same == (style in ("none", "constant"))
    if style == "swapped":
        assert one.startswith("Task: CounterFact") and other.startswith("Task: ZsRE")
        before = EditRecord(1, "counterfact", "Orla", "Orla is", "tall")
        assert "negative" not in add_instruction(before, 0, "full").prompt
        assert "positive" in add_instruction(before, 0,
                                             "swapped").prompt, "no sentiment is wanted: any other"


def test_draws_depend_on_seed_task_and_record_alone():
    numbers = [instructions.draw(FACT, seed) for seed in range(200)]
    assert set(numbers) == set(range(SEEN)) and numbers[0] == instructions.draw(FACT)
    assert {instructions.draw(FACT, seed, 3) for seed in range(50)} == {0, 1, 2}


def test_the_study_has_ten_checked_descriptions_per_task():
    texts = instructions.descriptions()
    assert list(texts) == list(TITLES) and all(instructions.read()[task]["about"] for task in texts)
    assert all(check_descriptions(task, part) == part for task, part in texts.items())


@pytest.mark.parametrize("task, texts, words", [
    ("recent", ["a b c"] * 10, "1 different descriptions, needed are 10"),
    ("recent", [f"say it {i} {{topic}}" for i in range(10)], "has a slot that nothing fills"),
    ("recent", [f"say {i}" for i in range(10)], "has 2 words, not 3 to 40"),
    ("convsent", [f"say {{topic}} {i} times" for i in range(10)], "needs {sentiment} once")])
def test_bad_descriptions_are_named(task, texts, words):
    with pytest.raises(ValueError, match=words):
        check_descriptions(task, texts)


def test_bad_calls_are_named():
    with pytest.raises(ValueError,
                       match="unknown style 'loud': choose one of " + ", ".join(STYLES)):
        add_instruction(FACT, 0, "loud")
    with pytest.raises(ValueError, match="recent has descriptions 0 to 9, not 10"):
        add_instruction(FACT, 10)
