"""Tell which facts a model knows: those that it writes out by itself, greedily.

    facts = [fact for fact, knows in zip(facts, known(model, tok, facts)) if knows]
"""

from pathlib import Path

import torch
from filelock import FileLock

from editcore.files import cache_folder, read_json, sha256_text, write_json
from editcore.likelihood import states
from editcore.model import content_hash, max_length
from editcore.progress import bar
from editcore.suffix import head
from editcore.tokens import batches, encode_pairs, pad

MAX_TOKENS = 2048       # of prompts and answers in one pass


def known(model, tok, facts, cache=None):
    """Return a list of bool: whether the model's greedy continuation of each prompt is the answer.

    It must begin with target_true, and a word must end there: "Swedish" is not "Swede". A fact
    without target_true, too long for the model, or with an answer that the tokenizer cannot write
    is not known. Answers are kept in `cache` (default: `files.cache_folder()`) by weights,
    tokenizer, prompt and answer.
    """
    asked = {sha256_text(fact.text, fact.target_true): (fact.text, fact.target_true)
             for fact in facts}
    key = sha256_text(content_hash(model), tok.backend_tokenizer.to_str())
    path = Path(cache or cache_folder()) / f"known-{key[:24]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):       # another process may be asking
        hits = read_json(path) if path.is_file() else {}
        missing = [name for name in asked if name not in hits]
        if missing:
            answers = _written(model, tok, [asked[name] for name in missing])
            hits |= dict(zip(missing, answers))
            write_json(path, hits)
    return [hits[sha256_text(fact.text, fact.target_true)] for fact in facts]


def _written(model, tok, asked):
    """A list of bool for (prompt, answer) pairs, from one pass over each prompt with its answer."""
    pairs = [_pair(tok, prompt, answer) for prompt, answer in asked]
    askable = [index for index, (prompt, answer) in enumerate(pairs)
               if answer and len(prompt) + len(answer) <= max_length(model)]
    hits = [False] * len(asked)
    groups = list(batches([len(sum(pairs[index], [])) for index in askable], MAX_TOKENS))
    for group in bar(groups, "asking what the model knows"):
        places = [askable[i] for i in group]
        best = _best(model, [pairs[place] for place in places])
        for place, ids in zip(places, best):
            hits[place] = ids[:-1] == pairs[place][1] and _ends_word(tok, ids)
    return hits


def _pair(tok, prompt, answer):
    try:
        return encode_pairs(tok, [(prompt, answer)])[0] if answer else ([], [])
    except ValueError:      # the tokenizer cannot write it
        return [], []


@torch.no_grad()
def _best(model, pairs):
    """For each (prompt, answer) the most likely token at each place of the answer and after it."""
    ids, _ = pad([prompt + answer for prompt, answer in pairs],
                 device=next(model.parameters()).device)
    hidden = states(model, ids)
    places = [(b, len(prompt) - 1 + k) for b, (prompt, answer) in enumerate(pairs)
              for k in range(len(answer) + 1)]
    best = head(model, hidden[tuple(torch.tensor(places).T)]).argmax(-1).cpu()
    return [part.tolist() for part in best.split([len(answer) + 1 for _, answer in pairs])]


def _ends_word(tok, ids):
    """True if the text of all ids but the last is not continued inside its word by the last."""
    text = tok.decode(ids[:-1])
    return not tok.decode(ids)[len(text):][:1].isalnum()
