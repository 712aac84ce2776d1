"""Ask a model few-shot classification questions; weighted F1 of its answers, as rows.

    tasks = prepare(model, tok, {"sst2": items, ...}, shots=4, seed=0)    # once
    rows = evaluate(model, tok, tasks)                      # as often as the weights change
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score

from editcore import generate
from editcore.files import read_json
from editcore.likelihood import ScoringPlan, plan, read
from editcore.model import max_length
from editcore.tokens import answer_ids, check_lengths, encode

SEPARATOR = "\n\n"
NEW_TOKENS = 3      # of a greedy answer, in which the label word must appear (arXiv 2401.07453)
INVALID = -1        # the class of an answer without a label word
IMPOSSIBLE = -1e9   # log-probability of a label whose own is not finite
# Weighted F1 of a model that knows nothing, on as many items of each of two labels.
CHANCE = {"one answer to everything": 1 / 3, "no readable answer": 0.0}


@dataclass(frozen=True)
class TaskPrompt:
    """Say how a task is asked: `template` has GLUE's field names; a label word follows its end."""

    template: str
    labels: tuple[str, ...]     # label words by GLUE's label number, without the leading space


TASKS = {
    "sst2": TaskPrompt("Review: {sentence}\nSentiment:", ("negative", "positive")),
    "mrpc": TaskPrompt("Sentence 1: {sentence1}\nSentence 2: {sentence2}\nSame meaning:",
                       ("no", "yes")),
    "cola": TaskPrompt("Sentence: {sentence}\nGrammatical:", ("no", "yes")),
    # GLUE's RTE: 0 = entailment. (A published prompt has the words the wrong way round.)
    "rte": TaskPrompt("{sentence1}\nQuestion: {sentence2} True or false?\nAnswer:",
                      ("true", "false")),
}


@dataclass(frozen=True)
class Task:
    """One task's items, ready to be asked."""

    name: str
    prompts: tuple          # n texts that end before the label word
    gold: np.ndarray        # (n,) labels
    words: tuple            # the label words
    sizes: np.ndarray       # (labels,) tokens of each label word
    plan: ScoringPlan       # every prompt with every label word, prompt by prompt


def task_prompt(name):
    """Return the TaskPrompt of a task; ValueError lists the known names."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def question(name, item):
    """Return one item without its answer; ValueError names a missing field."""
    try:
        return task_prompt(name).template.format(**{key: str(item[key]).strip() for key in item})
    except KeyError as error:
        raise ValueError(f"{name} item has no field {error}: found "
                         f"{', '.join(sorted(item))}") from None


def answer(name, item, label=None):
    """Return an item's label word, with its leading space; ValueError for an unknown label."""
    words = task_prompt(name).labels
    if item.get("label") not in range(len(words)):
        raise ValueError(f"{label or f'{name} item'}: label {item.get('label')!r} is not 0 to "
                         f"{len(words) - 1}")
    return f" {words[item['label']]}"


def few_shot(model, tok, items_by_task, *, shots=4, seed=0):
    """Prepare and ask the tasks once: the rows of `evaluate` for {task: items}."""
    return evaluate(model, tok, prepare(model, tok, items_by_task, shots=shots, seed=seed))


def prepare(model, tok, items_by_task, *, shots=4, seed=0):
    """Make the Tasks of {task: items in GLUE's layout}.

    `shots` items of each task, drawn with the seed, labels in turn, are shown solved before every
    question and are not asked themselves; that beginning is run once per measurement. ValueError
    names the task and item that is damaged, that is longer than the model, or that there are too
    few of.
    """
    return tuple(_prepare_task(model, tok, name, items, _draw(name, items, shots, seed))
                 for name, items in items_by_task.items())


def _draw(name, items, shots, seed):
    """Indices of the solved items, in the order in which they are shown."""
    generator = random.Random(f"{seed} {name}")
    n_labels = len(task_prompt(name).labels)
    chosen = []
    for label in range(n_labels):
        indices = [i for i, item in enumerate(items) if item.get("label") == label]
        wanted = shots // n_labels + (label < shots % n_labels)
        if len(indices) <= wanted:
            raise ValueError(f"{name}: {len(indices)} items of label {label} are too few for "
                             f"{wanted} solved examples and a question")
        chosen += generator.sample(indices, wanted)
    return generator.sample(chosen, len(chosen))


def _prepare_task(model, tok, name, items, shown):
    asked = [i for i in range(len(items)) if i not in shown]
    shots = [question(name, items[i]) + answer(name, items[i]) for i in shown]
    prompts = tuple(SEPARATOR.join([*shots, question(name, items[i])]) for i in asked)
    words = task_prompt(name).labels
    labels = [answer_ids(tok, prompts[0], word) for word in words]     # prompts end alike
    rows = encode(tok, prompts)
    room = [0] * max(NEW_TOKENS, *map(len, labels))
    for i, row in zip(asked, rows):
        answer(name, items[i], f"{name} item {i}")
        label = f"{name} item {i}: with {len(shown)} solved examples and an answer"
        check_lengths([row + room], [label], max_length(model))
    scoring = plan(model, [(row, label) for row in rows for label in labels])
    gold = np.array([items[i]["label"] for i in asked])
    return Task(name, prompts, gold, words, np.array([len(label) for label in labels]), scoring)


def evaluate(model, tok, tasks):
    """Ask prepared tasks of the model as it is now; rows {"metric", "value"} from 0 to 1.

      {task}_f1          weighted F1 of the greedy answer; an unreadable one is never right
      {task}_invalid     share of unreadable answers; "invalid" over all items
      {task}_prob_f1     weighted F1 of the label word of highest probability; always readable
      {task}_calibrated_f1   the same after each label's mean log-probability over all items is
                         taken off (arXiv 2309.17249): about 1/2 by chance
    """
    rows = []
    unread = []
    for task in tasks:
        answered = answers(model, tok, task)
        rows += [{"metric": task.name + name, "value": weighted_f1(task.gold, labels)}
                 for name, labels in zip(("_f1", "_prob_f1", "_calibrated_f1"), answered)]
        unread.append(answered[0] == INVALID)
        rows.append({"metric": f"{task.name}_invalid", "value": float(unread[-1].mean())})
    if unread:
        rows.append({"metric": "invalid", "value": float(np.concatenate(unread).mean())})
    return rows


def answers(model, tok, task):
    """Return (greedy, likely, calibrated), each (n,): every item's label in three ways.

    These are greedy decoding, probability, and probability against the label's mean. A greedy
    answer is the label word that decoding begins with, else the first one in NEW_TOKENS new tokens,
    else INVALID. Only items whose first tokens are no label word are decoded further.
    """
    scores = read(model, task.plan)
    shape = (len(task.prompts), len(task.words))
    logp = -(scores.nll * scores.sizes).reshape(shape)
    logp = np.where(np.isfinite(logp), logp, IMPOSSIBLE)
    likely = logp.argmax(1)
    calibrated = (logp - logp.mean(0)).argmax(1)
    # A label whose tokens are all the argmax is what decoding writes; of "no" and "no one" the
    # longer one.
    written = scores.exact.reshape(shape) * task.sizes
    greedy = np.where(written.any(1), written.argmax(1), INVALID)
    unclear = np.flatnonzero(greedy == INVALID)
    texts = generate.texts(model, tok, [task.prompts[i] for i in unclear], NEW_TOKENS)
    greedy[unclear] = [parsed(text, task.words) for text in texts]
    return greedy, likely, calibrated


def parsed(text, words):
    """Return the index of the first of `words` in a text, as a whole word in any case."""
    matches = [(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE), word)
               for word in words]
    hits = [(match.start(), -len(word), words.index(word)) for match, word in matches if match]
    return min(hits)[-1] if hits else INVALID


def weighted_f1(gold, answered):
    """Return F1 of each label in `gold`, weighted by how often it occurs; 0 to 1."""
    return float(f1_score(gold, answered, labels=np.unique(gold), average="weighted",
                          zero_division=0))


def read_tasks(folder, n=0):
    """Read {task: items} of the known tasks in a folder; n > 0: so many each, balanced."""
    paths = {name: Path(folder) / f"{name}.json" for name in TASKS}
    items = {name: read_items(path, name) for name, path in paths.items() if path.is_file()}
    if not items:
        raise ValueError(f"{folder}: none of {', '.join(map('{}.json'.format, TASKS))} is in it")
    return {name: balanced(every, n) if 0 < n < len(every) else every
            for name, every in items.items()}


def read_items(path, name):
    """Read a task's JSON file in GLUE's layout: [{"sentence" or "sentence1", ..., "label"}].

    ValueError names the file and the item that is damaged.
    """
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a non-empty list of items")
    for index, item in enumerate(items):
        try:
            if not isinstance(item, dict):
                raise ValueError("expected an object with a label")
            answer(name, item)
            question(name, item)
        except ValueError as error:
            raise ValueError(f"{path}: item {index}: {error}") from error
    return items


def balanced(items, n, *, seed=0):
    """Draw n items, as many of each label, and shuffle them; ValueError if there are too few."""
    generator = random.Random(seed)
    groups = {}
    for item in sorted(items, key=lambda item: item["label"]):
        groups.setdefault(item["label"], []).append(item)
    size, rest = divmod(n, max(len(groups), 1))
    counts = {label: len(group) for label, group in groups.items()}
    if rest or min(counts.values(), default=0) < size:
        raise ValueError(f"{n} balanced items asked for, but there are {counts} of each label")
    chosen = [item for group in groups.values() for item in generator.sample(group, size)]
    return generator.sample(chosen, n)
