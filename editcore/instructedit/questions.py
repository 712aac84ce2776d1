"""Ask models about records: every question of many records, each under its own edit, in few passes.

    batch = prepare(model, tok, records)
    before = read(model, batch)
    entered = enter(model, batch, layer)        # the blocks below run once
    after = read(model, batch, edits, entered)  # edits of block `layer` and those above it
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from editcore.instructedit import edit_gradients, token_tree
from editcore.instructedit.batched_edits import each_row
from editcore.likelihood import LOGITS, above, states
from editcore.suffix import head, quick
from editcore.tokens import batches as length_batches
from editcore.tokens import encode_pairs

SAME = "same"       # replies of ConvSent's wanted sentiment
OPPOSITE = "opposite"


@dataclass(frozen=True)
class QuestionBatch:
    """All questions about some records and the passes that answer them."""

    records: tuple
    questions: pd.DataFrame     # record (index), metric, first and count of its pairs
    passes: tuple               # (records of the rows, TreeBatch, place of each prediction below)
    starts: np.ndarray          # (n,) first token of each pair among the tokens of all pairs
    sizes: np.ndarray           # (n,) target tokens of each pair


@dataclass(frozen=True)
class Answers:
    """What a model says at every target token of a QuestionBatch."""

    logp: np.ndarray        # (E,) float64, log P of the token, teacher-forced
    best: np.ndarray        # (E,) the most likely token
    right: np.ndarray       # (E,) bool, whether that is the target's


def questions_of(record):
    """[(metric, prompt, continuations)] of a record.

    Of a locality question one answer is read, of another topic's replies all; of a portability
    question all answers.
    """
    stays = [("Loc", ask.prompt, ask.answers if record.topic else ask.answers[:1])
             for ask in record.locality]
    if record.topic:
        return [(SAME, record.prompt, record.wanted), (OPPOSITE, record.prompt, record.unwanted),
                *stays]
    return [("Rel", record.prompt, record.wanted),
            *[("Gen", prompt, record.wanted) for prompt in record.rephrase], *stays,
            *[("Port", ask.prompt, ask.answers) for ask in record.portability]]


def kinds_of(record):
    """What each of `questions_of(record)` is about: "edit", "rephrase", or its Ask's kind."""
    edit = ["edit", "edit"] if record.topic else ["edit", *["rephrase"] * len(record.rephrase)]
    asks = record.locality + (() if record.topic else record.portability)
    return [*edit, *[ask.kind for ask in asks]]


def prepare(model, tok, records, max_tokens=4096):
    """The QuestionBatch of records for a model; ValueError names a record that is too long."""
    pairs = []
    questions = []
    owner = []
    for index, record in enumerate(records):
        for metric, prompt, texts in questions_of(record):
            questions.append((index, metric, len(pairs), len(texts)))
            pairs += [(prompt, text) for text in texts]
            owner += [index] * len(texts)
    labels = [f"record {records[index].case_id}" for index in owner]
    pairs = encode_pairs(tok, pairs, labels)
    token_tree.check_pairs(model, pairs, labels)
    sizes = np.array([len(target) for _, target in pairs], dtype=np.int64)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
    first = np.searchsorted(owner, np.arange(len(records) + 1))
    trees = [token_tree.build(pairs[start:end], int(start))
             for start, end in zip(first, first[1:])]
    passes = []
    device = next(model.parameters()).device
    for group in length_batches([len(tree.ids) for tree in trees], max_tokens):
        batch = token_tree.pack([trees[index] for index in group], device)
        places = [starts[first[index]] + np.arange(len(trees[index].predictions))
                  for index in group]
        passes.append((tuple(group), batch, np.concatenate(places)))
    table = pd.DataFrame(questions, columns=["record", "metric", "first", "count"])
    return QuestionBatch(tuple(records), table, tuple(passes), starts, sizes)


def enter(model, batch, layer):
    """The BlockInputs of each pass of a QuestionBatch at block `layer`: `read` begins there."""
    with quick(model):
        return [edit_gradients.below(model, trees, layer) for _, trees, _ in batch.passes]


@torch.no_grad()
def read(model, batch, edits=None, entered=None):
    """The Answers to a QuestionBatch, with edits[i] (Delta, Patch or None) in place for record i.

    entered: from `enter`, at a block that lies above no edit. Codebooks are looked up at the
    prompt's last token, where published GRACE looks.
    """
    edits = edits or [None] * len(batch.records)
    if len(edits) != len(batch.records):
        raise ValueError(f"questions: {len(edits)} edits for {len(batch.records)} records")
    total = int(batch.sizes.sum())
    answers = Answers(np.empty(total), np.empty(total, dtype=np.int64), np.empty(total, dtype=bool))
    for number, (owner, trees, entries) in enumerate(batch.passes):
        with quick(model), each_row(model, edits, owner, trees.ends_prompt):
            hidden = above(model, entered[number]) if entered else _whole(model, trees)
            logp, best = _predictions(model, hidden.flatten(0, 1), trees)
        answers.logp[entries] = logp.double().cpu().numpy()
        answers.best[entries] = best.cpu().numpy()
        answers.right[entries] = (best == trees.token).cpu().numpy()
    return answers


def _whole(model, trees):
    """(B, T, d) final states of a TreeBatch, from its tokens on."""
    mask = trees.mask(next(model.parameters()).dtype)
    return states(model, trees.ids, position_ids=trees.positions, attention_mask=mask)


def _predictions(model, hidden, trees):
    """(log P of each target token (M,), most likely token there (M,)) of states (B T, d)."""
    place, pick = trees.place.unique(return_inverse=True)
    logp = []
    best = []
    order = pick.argsort(stable=True)
    limit = max(1, LOGITS // model.config.vocab_size)
    for first in range(0, len(place), limit):
        logits = head(model, hidden[place[first:first + limit]])
        inside = order[(pick[order] >= first) & (pick[order] < first + limit)]
        rows = pick[inside] - first
        logp.append(logits.log_softmax(-1)[rows, trees.token[inside]])
        best.append(logits.argmax(-1)[rows])
    back = order.argsort()
    return torch.cat(logp)[back], torch.cat(best)[back]
