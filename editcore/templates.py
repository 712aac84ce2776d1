"""An unedited model and a seed, or a file, in; the context templates in which an editor sees each prompt out."""

from dataclasses import dataclass

import torch

from editcore.files import read_json
from editcore.generate import continuations
from editcore.tokens import encode


@dataclass(frozen=True)
class TemplateGroup:
    """Texts to sample: `number` from each start."""

    tokens: int             # length of each text, its start included
    number: int             # texts a start
    starts: tuple = ("",)   # first words; "" is the start of a text


def sample(model, tok, groups, seed, top_k=5):
    """("{}", "text. {}", …): the plain template and one for each sampled text, `top_k` sampling, one CPU generator.

    Braces in a text become spaces, so that every template has one {}.
    """
    generator = torch.Generator().manual_seed(seed)
    out = ["{}"]
    for group in groups:
        openings = [start or text_start(tok) for start in group.starts for _ in range(group.number)]
        words = [start for start in group.starts for _ in range(group.number)]
        used = {len(row) for row in encode(tok, openings)}
        if max(used) >= group.tokens:
            raise ValueError(f"context templates of {group.tokens} tokens: a start has {max(used)} already")
        new = continuations(model, tok, openings, group.tokens - min(used), top_k, generator)
        texts = tok.batch_decode(new, skip_special_tokens=True)
        out += [template(word + text) for word, text in zip(words, texts, strict=True)]
    return tuple(out)


def template(text):
    """"text. {}" without braces in the text."""
    return text.replace("{", " ").replace("}", " ").strip() + ". {}"


def text_start(tok):
    """The prompt whose tokens are what opens a text: empty where the tokenizer adds a BOS, else its BOS or EOS."""
    return "" if tok("")["input_ids"] else tok.bos_token or tok.eos_token


def read(path):
    """The templates of a JSON file: a list of texts or of groups of them, flattened. ValueError names the file."""
    return check(_flat(read_json(path)), path)


def check(templates, label="contexts"):
    """The templates as a tuple if the first is "{}" and every one is a text with exactly one {}; else ValueError."""
    if not templates or templates[0] != "{}":
        raise ValueError(f"{label}: the first context template must be the plain prompt, \"{{}}\"")
    for one in templates:
        if not isinstance(one, str) or one.count("{}") != 1:
            raise ValueError(f"{label}: {one!r} is not a context template (a text with exactly one {{}})")
    return tuple(templates)


def _flat(value):
    return [one for item in value for one in _flat(item)] if isinstance(value, list) else [value]
