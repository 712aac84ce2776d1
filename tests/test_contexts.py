"""editcore.contexts: templates with one place for the prompt, the same for the same seed, read from either layout."""

import json

import pytest
import torch

from editcore.editors.memit import STARTS
from editcore.generate import continuations
from editcore.templates import TemplateGroup, read, sample, template, text_start


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sampled_templates(family, request):
    model, tok = request.getfixturevalue(family)
    groups = (TemplateGroup(5, 3), TemplateGroup(10, 1, STARTS))
    made = sample(model, tok, groups, seed=3)
    assert len(made) == 1 + 3 + 5 and made[0] == "{}"
    assert all(one.count("{}") == 1 and one.endswith(". {}") for one in made[1:])
    assert all(one.startswith(start) for one, start in zip(made[4:], STARTS))
    assert sample(model, tok, groups, seed=3) == made != sample(model, tok, groups, seed=4)


def test_lengths_count_the_start(gpt2):
    model, tok = gpt2
    assert len(tok(text_start(tok))["input_ids"]) == 1
    four = continuations(model, tok, [text_start(tok)], 4, 5, torch.Generator().manual_seed(0))
    assert sample(model, tok, (TemplateGroup(5, 1),), seed=0)[1] == template(tok.batch_decode(four)[0])


def test_a_start_longer_than_the_text_is_an_error(gpt2):
    with pytest.raises(ValueError, match="templates of 3 tokens"):
        sample(*gpt2, (TemplateGroup(3, 1, ("Everybody knows that all is good",)),), seed=0)


def test_braces_are_taken_out():
    assert template(" a {b} {} c ") == "a  b     c. {}"


def test_files_in_both_layouts(tmp_path):
    path = tmp_path / "contexts.json"
    for layout in (["{}", "A. {}", "B. {}"], [["{}"], ["A. {}", "B. {}"]]):
        path.write_text(json.dumps(layout))
        assert read(path) == ("{}", "A. {}", "B. {}")
    for bad, words in ((["A. {}"], "plain prompt"), (["{}", "no place"], "'no place' is not"), ([], "plain prompt"),
                       (["{}", 3], "3 is not"), ({"a": 1}, "plain prompt")):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=f"contexts.json.*{words}"):
            read(path)
