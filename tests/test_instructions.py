"""editcore.instructions: the frame of the paper, slots filled, locality left alone, every control of its own kind."""

import re

import pytest

from editcore.instructedit.instructions import (
    ABOUT,
    DESCRIPTIONS,
    SEEN,
    STYLES,
    TITLES,
    checked,
    describe,
    drawn,
    instructed,
    prefixed,
)
from editcore.instructedit.records import READERS, Ask, EditRecord

ONE = EditRecord(3, "counterfact", "Orla", "Orla speaks", "Bol", rephrase=("The tongue of Orla is",),
                 locality=(Ask("Forgetfulness", "Ann speaks", ("Vlud",)),),
                 portability=(Ask("Reasoning", "The twin of Orla speaks", ("Bol",)),))
TALK = EditRecord(4, "convsent", "old {x} maps", "Tell me about old {x} maps.", "", positive=("I do",),
                  negative=("I do not",), sentiment="negative", topic="old {x} maps")


def test_ten_descriptions_a_task_nine_of_them_seen():
    assert set(DESCRIPTIONS) == set(TITLES) == set(ABOUT) == set(READERS) and SEEN == 9
    texts = [text for task, ten in DESCRIPTIONS.items() for text in checked(task, ten)]
    assert len(set(texts)) == 40 and all(text.endswith(".") and "\n" not in text for text in texts)


def test_the_frame_is_the_published_one():
    text = describe("counterfact", 2)
    assert prefixed(ONE, 2) == f"Task: CounterFact\nDescription: {text}\nInput: Orla speaks"


def test_slots_are_filled_with_the_wanted_sentiment_and_the_topic():
    for number in range(10):
        text = describe("convsent", number, TALK.sentiment, TALK.topic)
        assert "negative" in text and "old {x} maps" in text and "{topic}" not in text
        assert text in prefixed(TALK, number)


def test_all_prompts_but_localitys_are_behind_the_instruction():
    made = instructed(ONE, 9)
    head = f"Task: CounterFact\nDescription: {describe('counterfact', 9)}\nInput: "
    assert made.prompt == head + ONE.prompt and made.rephrase == (head + ONE.rephrase[0],)
    assert made.portability[0].prompt == head + ONE.portability[0].prompt
    assert made.portability[0].answers == ("Bol",) and made.locality == ONE.locality and made.target == "Bol"


def test_controls_keep_what_they_are_named_after():
    heads = {style: prefixed(ONE, 1, style).removesuffix(ONE.prompt) for style in STYLES}
    assert heads["none"] == "" and len(set(heads.values())) == len(heads)
    assert heads["task"] == "Task: CounterFact\nInput: "
    assert heads["description"] == f"Description: {describe('counterfact', 1)}\nInput: "
    assert "ConvSent" in heads["swapped"] and "Orla" in heads["swapped"] and "positive" in heads["swapped"]
    tasks = [EditRecord(0, task, "x", "y", "z", sentiment="positive", topic="t") for task in TITLES]
    assert len({prefixed(one, 0, "constant") for one in tasks}) == 1
    assert len({prefixed(one, 0, "random") for one in tasks}) == 4
    assert prefixed(ONE, 0, "random") == prefixed(ONE, 5, "random")
    lines = [re.findall("^(?:Task|Description|Input): .", prefixed(one, 0, "swapped"), re.M) for one in tasks]
    assert [len(found) for found in lines] == [3] * 4


def test_a_description_is_drawn_once_a_record_from_the_seen_ones():
    rows = [EditRecord(i, "recent", "x", "y", "z") for i in range(200)]
    numbers = [drawn(row) for row in rows]
    assert numbers == [drawn(row) for row in rows] != [drawn(row, seed=1) for row in rows]
    assert set(numbers) == set(range(9)) and {drawn(row, count=3) for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("call, words", [
    (lambda: describe("x", 0), "unknown task 'x': choose one of recent"),
    (lambda: describe("zsre", 10), "zsre has descriptions 0 to 9, not 10"),
    (lambda: prefixed(ONE, 0, "bold"), "unknown style 'bold': choose one of full"),
    (lambda: checked("recent", ["one two three"] * 10), "recent: 1 different descriptions, needed are 10"),
    (lambda: checked("convsent", [f"a {i} {{topic}}" for i in range(10)]), r"needs \{sentiment\} once"),
    (lambda: checked("recent", [f"a {i} {{topic}}" for i in range(10)]), "has a slot that nothing fills"),
    (lambda: checked("recent", [f"{i}" for i in range(10)]), "has 1 words, not 3 to 40"),
])
def test_what_cannot_be_used_is_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()
