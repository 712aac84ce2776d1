"""editcore.templates: one place for the prompt, equal for equal seeds, read from either layout."""

import json

import pytest
import torch
from conftest import chat_tokenizer

from editcore import generate
from editcore.generate import continuations
from editcore.templates import TemplateGroup, cached, read, sample, template
from editcore.tokens import encode, text_start

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


def test_start_and_text_are_decoded_together(llama):
    model, tok = llama
    group = TemplateGroup(10, 4, ("The", "Sue Oakes lies"))
    sampled = sample(model, tok, (group,), seed=3)
    prompts = [start for start in group.starts for _ in range(4)]
    rows = encode(tok, prompts)
    new = continuations(model, tok, prompts, 10 - min(map(len, rows)), top_k=5,
                        generator=torch.Generator().manual_seed(3)).tolist()
    pieces = [tok.convert_ids_to_tokens(row + more) for row, more in zip(rows, new)]
    texts = ["".join(piece for piece in row if piece not in tok.all_special_tokens)
             for row in pieces]
    assert sampled[1:] == tuple(template(text.replace("▁", " ")) for text in texts)
    assert any(text.startswith("The ") for text in sampled)


def test_first_words_follow_a_separator_that_is_not_the_bos(gpt2):
    model, tok = gpt2[0], chat_tokenizer()
    prompts = []
    write = generate.texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "texts", lambda model, tok, given, *args, **words:
                      prompts.append(given) or write(model, tok, given, *args, **words))
        sampled = sample(model, tok, (TemplateGroup(6, 1, ("", "The")),), seed=0)
        sample(*gpt2, (TemplateGroup(6, 1, ("", "The")),), seed=0)
    assert prompts == [["<|endoftext|>", "<|endoftext|>The"], ["<|endoftext|>", "The"]]
    assert sampled[2].startswith("The") and not any("<|" in text for text in sampled)


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
