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

    It must begin with target_true, case as it is, and a word must end there: "Swedish" is not
    "Swede". A fact without target_true, one that is too long for the model, and one whose answer
    the tokenizer cannot write are not known. Every prompt is asked once: the answers are kept in
    `cache` (default: `files.cache_folder()`) by weights and tokenizer, prompt and answer.
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
    answers = [answer for _, answer in pairs]
    limit = max_length(model)
    askable = [index for index, (prompt, answer) in enumerate(pairs)
               if answer and len(prompt) + len(answer) <= limit]
    rows = [sum(pairs[index], []) for index in askable]
    hits = [False] * len(asked)
    groups = list(batches([len(row) for row in rows], MAX_TOKENS))
    for group in bar(groups, "asking what the model knows"):
        sizes = [len(answers[askable[i]]) for i in group]
        best = _best(model, [rows[i] for i in group], sizes)
        for i, ids in zip(group, best):
            answer = answers[askable[i]]
            hits[askable[i]] = ids[:-1] == answer and _ends_word(tok, ids)
    return hits


def _pair(tok, prompt, answer):
    try:
        return encode_pairs(tok, [(prompt, answer)])[0] if answer else ([], [])
    except ValueError:      # the tokenizer cannot write it
        return [], []


@torch.no_grad()
def _best(model, rows, sizes):
    """For each id list the most likely token at each of its last `size` places and after it."""
    ids, _ = pad(rows, device=next(model.parameters()).device)
    hidden = states(model, ids)
    places = [(b, t) for b, (row, size) in enumerate(zip(rows, sizes))
              for t in range(len(row) - size - 1, len(row))]
    picked = hidden[tuple(torch.tensor(places).T)]
    best = head(model, picked).argmax(-1).cpu()
    return [part.tolist() for part in best.split([size + 1 for size in sizes])]


def _ends_word(tok, ids):
    """True if the text of all ids but the last is not continued inside its word by the last."""
    text = tok.decode(ids[:-1])
    return not tok.decode(ids)[len(text):][:1].isalnum()
