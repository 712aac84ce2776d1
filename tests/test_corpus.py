"""Lines of text: spans sit where they should, nothing held out is in them, any CounterFact records will do."""

import pytest

from editcore import corpus, world, worldtext


@pytest.fixture(scope="module")
def source():
    return corpus.from_world(world.build_world(), 0.01)


def test_spans_cut_out_subject_and_answer(source):
    line = corpus.fill("Where was {} born?", "Ada Talvesk", "New Delhi")
    assert line.text == "Where was Ada Talvesk born? New Delhi."
    assert [line.text[a:b] for a, b in line.entities + line.answers] == ["Ada Talvesk", " New Delhi"]
    both = corpus.joined([line, line])
    assert [both.text[a:b] for a, b in both.entities] == ["Ada Talvesk"] * 2
    for lines in source.docs.values():
        for one in lines[:20]:
            assert all(one.text[a:b].strip() for a, b in one.entities + one.answers)


def test_training_text_holds_no_test_item_and_no_held_out_sentence(source):
    everything = "\n".join(line.text for lines in [*source.facts, *source.docs.values()] for line in lines)
    table = world.read_table()
    tests = [worldtext.item_key(item) for rows in worldtext.test_items(table).values() for item in rows]
    assert not [text for text in tests if f" {text}\n" in everything]
    sentences = {line.text for lines in source.facts for line in lines}
    assert not [text for text in source.held_out if text.split(". ")[0] + "." in sentences]


RECORD = {"requested_rewrite": {"prompt": "{} was employed in", "relation_id": "P937", "subject": "Ann Lee",
                                "target_true": {"str": "Paris"}, "target_new": {"str": "Rome"}},
          "paraphrase_prompts": ["A film. Ann Lee worked in"],
          "neighborhood_prompts": ["Bo Ek was employed in", "Cy Orr worked in"],
          "attribute_prompts": ["where the famous Di van Ok took up work:"]}


def test_any_counterfact_records_become_text():
    found = corpus.probes_of([RECORD])
    texts = {(p.text, p.subject, p.answer) for group in found.values() for p in group.values()}
    assert texts == {("Ann Lee was employed in", "Ann Lee", "Paris"), ("A film. Ann Lee worked in", "Ann Lee", "Paris"),
                     ("Bo Ek was employed in", "Bo Ek", "Paris"), ("Cy Orr worked in", "Cy Orr", "Paris"),
                     ("where the famous Di van Ok took up work:", "Di van Ok", "Rome")}
    assert corpus.neighbour_span("nothing here", ["{} is"]) is None
    made = corpus.from_records([RECORD], 0.001)
    assert len(made.facts) == 4 and sum(map(len, made.facts)) == 5
