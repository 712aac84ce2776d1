"""Sample the context templates in which an editor sees each prompt, or read them from a file."""

from dataclasses import dataclass
from pathlib import Path

import torch

from editcore import generate
from editcore.files import flat, read_json, sha256_text, write_json
from editcore.model import content_hash
from editcore.tokens import encode, text_start

STARTS = ("The", "Therefore", "Because", "I", "You")     # of MEMIT's templates


@dataclass(frozen=True)
class TemplateGroup:
    """Texts to sample: `number` from each start."""

    tokens: int             # length of each text, its start included
    number: int             # texts per start
    starts: tuple = ("",)   # first words; "" is the start of a text


def sample(model, tok, groups, seed, *, top_k=5):
    """Sample ("{}", "text. {}", …): the plain template, then those of `groups`, by one generator.

    Where the start of a text is not the BOS, first words follow it too: without it, such models
    write no running text.
    """
    generator = torch.Generator().manual_seed(seed)
    opening = text_start(tok)
    before = "" if opening == tok.bos_token else opening
    templates = ["{}"]
    for group in groups:
        starts = [start for start in group.starts for _ in range(group.number)]
        prompts = [before + start if start else opening for start in starts]
        lengths = [len(row) for row in encode(tok, prompts)]
        n_new = group.tokens - min(lengths)
        if max(lengths) >= group.tokens:
            raise ValueError(f"context templates of {group.tokens} tokens: a start has "
                             f"{max(lengths)} already")
        texts = generate.texts(model, tok, prompts, n_new, top_k=top_k, generator=generator,
                               whole=True)
        templates += map(template, texts)
    return tuple(templates)


def cached(model, tok, groups, seed, folder):
    """Keep `sample` in `folder` by the model's weights, the tokenizer, the groups and the seed."""
    key = sha256_text(content_hash(model), tok.backend_tokenizer.to_str(), text_start(tok), groups,
                      seed)
    path = Path(folder) / f"templates-{key[:24]}.json"
    if not path.is_file():
        write_json(path, sample(model, tok, groups, seed))
    return read(path)


def template(text):
    """Return "text. {}" without braces in the text, so that there is one {}."""
    return text.replace("{", " ").replace("}", " ").strip() + ". {}"


def read(path):
    """Read the templates of a JSON file: a list of texts or of groups of them, flattened."""
    return check(flat(read_json(path)), path)


def check(templates, label="contexts"):
    """Return templates as a tuple; ValueError unless each has one {} and the first is "{}"."""
    if not templates or templates[0] != "{}":
        raise ValueError(f'{label}: the first context template must be the plain prompt, "{{}}"')
    for text in templates:
        if not isinstance(text, str) or text.count("{}") != 1:
            raise ValueError(f"{label}: {text!r} is not a context template: a text with one {{}}")
    return tuple(templates)
