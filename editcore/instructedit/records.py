"""Files of KnowEdit, ConvSent or zsRE records in, checked EditRecords of the four instruction-editing tasks out."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from editcore.facts import Fact
from editcore.files import read_json

# ConvSent's files hold topics and replies, no prompts: the first of these is the edit's prompt, the others rephrase it.
QUESTIONS = ("What do you think of {}?", "How do you feel about {}?", "Tell me about {}.")
SENTIMENTS = ("positive", "negative")


@dataclass(frozen=True)
class Ask:
    """One question about an edited model."""

    kind: str               # e.g. "Relation_Specificity", "Forgetfulness", "Reasoning", "Subject_Aliasing"
    prompt: str             # full text, no trailing space
    answers: tuple          # accepted answers, the preferred first; ConvSent: replies


@dataclass(frozen=True)
class EditRecord:
    """One edit of one task, with the questions that are asked after it."""

    case_id: int | str              # unique in its file
    task: str                       # "recent", "counterfact", "convsent" or "zsre"
    subject: str                    # who or what the edit is about
    prompt: str                     # full text, subject filled in, no trailing space
    target: str                     # wanted continuation, no leading space; "" for convsent
    old: str = ""                   # answer before the edit where the file tells it, else ""
    rephrase: tuple = ()            # full prompts with the meaning of `prompt`
    locality: tuple = ()            # Asks whose answers shall stay
    portability: tuple = ()         # Asks whose answers follow from the edit
    positive: tuple = ()            # replies of either sentiment (convsent only)
    negative: tuple = ()
    sentiment: str = ""             # the wanted one: "positive" or "negative" (convsent only)
    topic: str = ""                 # what the replies are about (convsent only)
    unanswered: int = 0             # questions left out because the file has no answer to them

    @property
    def wanted(self):
        """Continuations that the edit asks for: replies of the wanted sentiment, or the target."""
        return {"positive": self.positive, "negative": self.negative}.get(self.sentiment, (self.target,))

    @property
    def unwanted(self):
        """Replies of the opposite sentiment; () outside convsent."""
        return {"positive": self.negative, "negative": self.positive}.get(self.sentiment, ())


def read_records(path, task, bad=None, seed=0):
    """All EditRecords of a JSON file (a list) of one task's layout, in file order; case_id is the index in the file.

    bad: None stops at the first bad record; a list gets the error texts instead, and the records are left out. seed
    draws the sentiment wanted of each ConvSent topic. A question without answers is left out and counted in
    `unanswered`; the record stays. ValueError names file and record.
    """
    if task not in READERS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(READERS)}")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a non-empty list of records")
    records = []
    for index, row in enumerate(rows):
        try:
            records.append(record(row, task, index, seed))
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{Path(path).name}: {error}") from error
            bad.append(f"{Path(path).name}: {error}")
    if not records:
        raise ValueError(f"{path}: no usable record among {len(rows)}; first problem: {bad[0]}")
    return other_topics(records)


def record(row, task, case_id, seed=0):
    """The EditRecord of one JSON object; ValueError names the record and what is wrong with it."""
    where = f"record {case_id}"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    return READERS[task](row, task, case_id, seed)


def knowedit(row, task, case_id, seed=0):
    """KnowEdit's layout (Recent, WikiData_counterfact, its own zsRE)."""
    where = f"record {case_id}"
    lists = {name: _asks(row.get(name), f"{where}: {name}") for name in ("locality", "portability")}
    asks = {name: tuple(ask for ask in found if ask.answers) for name, found in lists.items()}
    left = sum(len(found) - len(asks[name]) for name, found in lists.items())
    old = _answers(row.get("ground_truth"), f"{where}: ground_truth")
    return EditRecord(case_id, task, _text(row, "subject", where), _text(row, "prompt", where),
                      _text(row, "target_new", where), old[0] if old else "", _rephrase(row, where), **asks,
                      unanswered=left)


def zsre(row, task, case_id, seed=0):
    """zsRE in MEND's evaluation layout with portability; a record in KnowEdit's layout is read as that."""
    if "src" not in row and "prompt" in row:
        return knowedit(row, task, case_id, seed)
    where = f"record {case_id}"
    made = EditRecord(case_id, task, _text(row, "subject", where), _text(row, "src", where), _text(row, "alt", where),
                      _old(row, where), _rephrase(row, where))
    ported = row.get("portability") or {}
    if not isinstance(ported, dict):
        raise ValueError(f"{where}: portability is not an object")
    pairs = {"locality": ("Unrelated", row, "loc", "loc_ans"),
             "portability": ("Reasoning", ported, "New Question", "New Answer")}
    for name, (kind, source, question, answer) in pairs.items():
        if question in source:
            ask = Ask(kind, _text(source, question, where), _answers(source.get(answer), f"{where}: {answer}"))
            kept = {name: (ask,)} if ask.answers else {"unanswered": made.unanswered + 1}
            made = replace(made, **kept)
    return made


def convsent(row, task, case_id, seed=0):
    """ConvSent: the topic's question is the prompt, the wanted sentiment is drawn from the seed, record and topic."""
    where = f"record {case_id}"
    topic = _text(row, "ent", where)
    replies = {}
    for name in ("pos", "neg"):
        found = row.get(name)
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"{where}: {name} is not a list of texts")
        replies[name] = tuple(dict.fromkeys(text.strip() for text in found if text.strip()))
        if not replies[name]:
            raise ValueError(f"{where}: {name} has no reply")
    prompt, *others = (question.replace("{}", topic) for question in QUESTIONS)
    drawn = random.Random(f"{seed} {case_id} {topic}").choice(SENTIMENTS)
    return EditRecord(case_id, task, topic, prompt, "", rephrase=tuple(others), positive=replies["pos"],
                      negative=replies["neg"], sentiment=drawn, topic=topic)


READERS = {"recent": knowedit, "counterfact": knowedit, "convsent": convsent, "zsre": zsre}


def other_topics(records):
    """ConvSent records, each with the next other topic and all its replies as locality; other records as they are."""
    made = []
    for at, one in enumerate(records):
        others = (records[(at + k) % len(records)] for k in range(1, len(records)))
        near = next((other for other in others if one.topic and other.topic != one.topic), None)
        asks = (Ask("Other_Topic", near.prompt, near.positive + near.negative),) if near else one.locality
        made.append(replace(one, locality=asks))
    return made


def with_sentiment(one, sentiment):
    """A ConvSent record that wants `sentiment`."""
    if sentiment not in SENTIMENTS or not one.topic:
        raise ValueError(f"record {one.case_id}: cannot want sentiment {sentiment!r} of task {one.task}")
    return replace(one, sentiment=sentiment)


def as_fact(one):
    """The Fact of a record, for editors that edit facts; ConvSent: the first wanted reply is its target.

    ValueError names a record whose prompt does not contain its subject: nothing marks where the fact is looked up.
    """
    at = one.prompt.rfind(one.subject)
    if at < 0 or "{}" in one.prompt:
        raise ValueError(f"record {one.case_id}: no place for the subject {one.subject!r} in {one.prompt!r}")
    template = f"{one.prompt[:at]}{{}}{one.prompt[at + len(one.subject):]}"
    target = one.wanted[0]
    return Fact(case_id=one.case_id, subject=one.subject, prompt=template, target_new=target,
                target_true=one.old if one.old != target else "",
                paraphrases=one.rephrase, portability=tuple((a.kind, a.prompt, a.answers) for a in one.portability))


def _text(row, name, where):
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {'no ' + name if name not in row else name + ' is not a text, or empty'}")
    return value.strip()


def _rephrase(row, where):
    """rephrase or rephrase_prompt: a text, a list of texts, or absent."""
    value = row.get("rephrase", row.get("rephrase_prompt")) or ()
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: rephrase is neither a text nor a list of texts")
    return tuple(text.strip() for text in value if text.strip())


def _old(row, where):
    """zsRE: the model's own answer `pred`, else the first true one."""
    found = _answers(row.get("pred"), f"{where}: pred") + _answers(row.get("answers"), f"{where}: answers")
    return found[0] if found else ""


def _answers(value, where):
    """Every text in a text, a list of texts or lists of aliases (one list an object), once each; None is ()."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    if not isinstance(value, list):
        raise ValueError(f"{where}: an answer is {type(value).__name__}, neither a text nor a list")
    return tuple(dict.fromkeys(text for part in value for text in _answers(part, where)))


def _asks(groups, where):
    """Asks of {kind: [{prompt, ground_truth}]}, unanswered ones too; None is ()."""
    if groups is None:
        return ()
    if not isinstance(groups, dict):
        raise ValueError(f"{where} is not an object")
    asks = []
    for kind, questions in groups.items():
        if not isinstance(questions or [], list):
            raise ValueError(f"{where}: {kind} is not a list")
        for number, question in enumerate(questions or []):
            here = f"{where}: {kind} question {number}"
            if not isinstance(question, dict):
                raise ValueError(f"{here} is not an object")
            asks.append(Ask(kind, _text(question, "prompt", here), _answers(question.get("ground_truth"), here)))
    return tuple(asks)
