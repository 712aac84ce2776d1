"""editcore.templates: one place for the prompt, equal for equal seeds, read from either layout."""

import json

import pytest
import torch

from editcore.generate import continuations
from editcore.templates import TemplateGroup, cached, read, sample, template
from editcore.tokens import text_start

STARTS = ("The", "Therefore", "Because", "I", "You")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sampled_and_kept_templates(family, request, tmp_path):
    model, tok = request.getfixturevalue(family)
    groups = (TemplateGroup(5, 3), TemplateGroup(10, 1, STARTS))
    templates = sample(model, tok, groups, seed=3)
    assert len(templates) == 1 + 3 + 5 and templates[0] == "{}"
    assert all(text.count("{}") == 1 and text.endswith(". {}") for text in templates[1:])
    assert all(text.startswith(start) for text, start in zip(templates[4:], STARTS))
    assert sample(model, tok, groups, seed=3) == templates != sample(model, tok, groups, seed=4)
    for _ in range(2):
        assert cached(model, tok, groups, 3, tmp_path) == templates
    assert len(list(tmp_path.iterdir())) == 1
    cached(model, tok, groups, 4, tmp_path)
    cached(model, tok, groups[:1], 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_lengths_count_the_start(gpt2):
    model, tok = gpt2
    generator = torch.Generator().manual_seed(0)
    four = continuations(model, tok, [text_start(tok)], 4, top_k=5,
                         generator=generator)
    expected = template(tok.batch_decode(four)[0])
    assert template(" a {b} {} c ") == "a  b     c. {}"
    assert sample(model, tok, (TemplateGroup(5, 1),), seed=0)[1] == expected
    with pytest.raises(ValueError, match="templates of 3 tokens"):
        sample(model, tok, (TemplateGroup(3, 1, ("Everybody knows that all is good",)),), seed=0)


@pytest.mark.parametrize("content, words", [
    (["{}", "A. {}", "B. {}"], None),
    ([["{}"], ["A. {}", "B. {}"]], None),
    (["A. {}"], "plain prompt"),
    (["{}", "no place"], "'no place' is not"),
    ([], "plain prompt"),
    (["{}", 3], "3 is not"),
    ({"a": 1}, "plain prompt"),
])
def test_files(content, words, tmp_path):
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps(content))
    if words is None:
        assert read(path) == ("{}", "A. {}", "B. {}")
    else:
        with pytest.raises(ValueError, match=f"contexts.json.*{words}"):
            read(path)
