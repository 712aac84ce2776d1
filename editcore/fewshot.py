"""A model and classification items in; weighted F1 of few-shot answers, greedy and by label probability, out as rows.

    prepared = prepare(model, tok, {"sst2": items, ...}, shots=4, seed=0)     # once
    rows = evaluate(model, tok, prepared)                                     # as often as the weights change
"""

import random
import re
from dataclasses import dataclass

import numpy as np

from editcore import generate
from editcore.fewshot_tasks import question, render, task
from editcore.files import read_json
from editcore.likelihood import ScoringPlan, plan, read
from editcore.model import max_length
from editcore.tokens import encode, target_ids

NEW_TOKENS = 3      # of a greedy answer, in which the label word must appear (arXiv 2401.07453)
INVALID = -1        # the class of an answer without a label word
# Weighted F1 of a model that knows nothing, on as many items of each of two labels: lines to draw beside every curve.
CHANCE = {"one answer to everything": 1 / 3, "no readable answer": 0.0}


@dataclass(frozen=True)
class Task:
    """One task's items, ready to be asked."""

    name: str
    prompts: tuple          # of n texts that end before the label word
    gold: np.ndarray        # (n,) labels
    words: tuple            # the label words
    sizes: np.ndarray       # (labels,) tokens of each label word
    plan: ScoringPlan              # every prompt with every label word, prompt by prompt


def few_shot(model, tok, items_by_task, shots=4, seed=0):
    """Rows {"metric", "value"} of `evaluate` for {task: items}, prepared and asked once."""
    return evaluate(model, tok, prepare(model, tok, items_by_task, shots, seed))


def prepare(model, tok, items_by_task, shots=4, seed=0):
    """The Tasks for {task: items in GLUE's layout}.

    `shots` items of each task, drawn with the seed, labels in turn, are shown solved before every question and are not
    asked themselves: all prompts of a task begin alike, and that beginning is run once a measurement. ValueError names
    the task and item that is damaged, that is longer than the model, or that there are too few of.
    """
    return tuple(_prepared(model, tok, name, items, _drawn(name, items, shots, seed))
                 for name, items in items_by_task.items())


def _drawn(name, items, shots, seed):
    """Indices of the solved examples, in the order in which they are shown."""
    draw = random.Random(f"{seed} {name}")
    by_label = [[i for i, item in enumerate(items) if item.get("label") == label]
                for label in range(len(task(name).labels))]
    wanted = [shots // len(by_label) + (label < shots % len(by_label)) for label in range(len(by_label))]
    if any(len(several) <= n for several, n in zip(by_label, wanted)):
        raise ValueError(f"{name}: {[len(several) for several in by_label]} items of each label are too few for "
                         f"{shots} solved examples and a question")
    chosen = [i for several, n in zip(by_label, wanted) for i in draw.sample(several, n)]
    return draw.sample(chosen, len(chosen))


def _prepared(model, tok, name, items, shown):
    asked = [i for i in range(len(items)) if i not in shown]
    prompts = tuple(render(name, items[i], [items[j] for j in shown]) for i in asked)
    words = task(name).labels
    labels = [target_ids(tok, word) for word in words]
    rows, room = encode(tok, prompts), max(NEW_TOKENS, *map(len, labels))
    for i, row in zip(asked, rows):
        if items[i].get("label") not in range(len(words)):
            raise ValueError(f"{name} item {i}: label {items[i].get('label')!r} is not 0 to {len(words) - 1}")
        if len(row) + room > max_length(model):
            raise ValueError(f"{name} item {i}: {len(row)} tokens with {len(shown)} solved examples and {room} for the "
                             f"answer, but the model takes at most {max_length(model)}")
    made = plan(model, [(row, label) for row in rows for label in labels])
    gold = np.array([items[i]["label"] for i in asked])
    return Task(name, prompts, gold, words, np.array([len(label) for label in labels]), made)


def evaluate(model, tok, prepared):
    """Rows {"metric", "value"} of prepared tasks for the model's present weights, values from 0 to 1. For each task:
      {task}_f1          weighted F1 of the greedy answer, an unreadable one is a class of its own and never right
      {task}_invalid     share of unreadable answers
      {task}_prob_f1     weighted F1 of the label word of highest probability; always readable
    and "invalid" over all items. Weighted F1 = sum over labels of (share of items with that label) x (its F1).

    An answer is the label word that greedy decoding begins with, else the first one in NEW_TOKENS new tokens (see
    `parsed`). One pass tells both scores; only items whose first tokens are no label word are decoded further.
    """
    rows, unread = [], []
    for one in prepared:
        greedy, likely = answers(model, tok, one)
        invalid = greedy == INVALID
        rows += [{"metric": f"{one.name}_f1", "value": weighted_f1(one.gold, greedy)},
                 {"metric": f"{one.name}_prob_f1", "value": weighted_f1(one.gold, likely)},
                 {"metric": f"{one.name}_invalid", "value": float(invalid.mean())}]
        unread.append(invalid)
    return rows + [{"metric": "invalid", "value": float(np.concatenate(unread).mean())}] if rows else []


def answers(model, tok, one):
    """(greedy, likely): (n,) label of each item by greedy decoding (or INVALID), and by the words' probability."""
    found, shape = read(model, one.plan), (len(one.prompts), len(one.words))
    logp = -(found.nll * found.sizes).reshape(shape)
    likely = np.where(np.isfinite(logp), logp, -np.inf).argmax(1)
    # a label whose tokens are all the argmax is what greedy decoding says; of "no" and "no one" it is the longer one
    said = found.exact.reshape(shape) * one.sizes
    greedy = np.where(said.any(1), said.argmax(1), INVALID)
    unclear = np.flatnonzero(greedy == INVALID)
    texts = generate.texts(model, tok, [one.prompts[i] for i in unclear], NEW_TOKENS)
    greedy[unclear] = [parsed(text, one.words) for text in texts]
    return greedy, likely


def parsed(text, words):
    """Index of the first of `words` that stands in a text as a whole word, in any case; INVALID if there is none."""
    hits = [(hit.start(), -len(word), i) for i, word in enumerate(words)
            if (hit := re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))]
    return min(hits)[-1] if hits else INVALID


def weighted_f1(gold, answered):
    """F1 of each label that occurs in `gold`, weighted by how often it does; 0 to 1."""
    def f1(label):
        said, right = answered == label, gold == label
        return 2 * (said & right).sum() / (said.sum() + right.sum())

    return float(sum((gold == label).mean() * f1(label) for label in sorted(set(gold.tolist()))))


def read_items(path, name, n=0, seed=0):
    """The items of one task's JSON file in GLUE's layout: a list of {"sentence" | "sentence1", "sentence2", "label"}.

    n > 0 draws n of them with a seed, as many of each label. ValueError names the file and the item that is damaged.
    """
    items, labels = read_json(path), range(len(task(name).labels))
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a non-empty list of items")
    for i, item in enumerate(items):
        if not isinstance(item, dict) or item.get("label") not in labels:
            raise ValueError(f"{path}: item {i}: expected an object with a label of {list(labels)}")
        try:
            question(name, item)
        except ValueError as error:
            raise ValueError(f"{path}: item {i}: {error}") from error
    return balanced(items, n, seed) if n else items


def balanced(items, n, seed=0):
    """n of the items, as many of each label, drawn and shuffled with a seed; ValueError if there are too few."""
    draw, groups = random.Random(seed), {}
    for item in items:
        groups.setdefault(item["label"], []).append(item)
    each = n // max(len(groups), 1)
    if n % max(len(groups), 1) or any(len(group) < each for group in groups.values()):
        raise ValueError(f"{n} balanced items asked for, but there are "
                         f"{ {label: len(group) for label, group in sorted(groups.items())} } of each label")
    chosen = [item for _, group in sorted(groups.items()) for item in draw.sample(group, each)]
    return draw.sample(chosen, n)
