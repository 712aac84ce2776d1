"""Read the records of the four editing tasks: KnowEdit's Recent and CounterFact, ConvSent, zsRE."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from editcore.facts import Fact, answers, clean, marked
from editcore.files import read_json
from editcore.instructedit.instructions import TITLES
from editcore.model import beside

# ConvSent's files hold topics and replies: the first question is the prompt, others rephrase it.
QUESTIONS = ("What do you think of {}?", "How do you feel about {}?", "Tell me about {}.")
SENTIMENTS = ("positive", "negative")
PROMPTS = ("prompt", "src", "loc", "New Question", "locality_prompt")   # fields of full prompts


@dataclass(frozen=True)
class Ask:
    """One question about an edited model."""

    kind: str               # such as "Relation_Specificity", "Forgetfulness", "Reasoning"
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
    old: str = ""                   # answer before the edit where the file tells it
    rephrase: tuple = ()            # full prompts with the meaning of `prompt`
    locality: tuple = ()            # Asks whose answers shall stay
    portability: tuple = ()         # Asks whose answers follow from the edit
    positive: tuple = ()            # replies of either sentiment (convsent only)
    negative: tuple = ()
    sentiment: str = ""             # the wanted one: "positive" or "negative" (convsent only)
    topic: str = ""                 # what the replies are about (convsent only)

    @property
    def wanted(self):
        """Continuations that the edit asks for: replies of the wanted sentiment, or the target."""
        replies = {"positive": self.positive, "negative": self.negative}
        return replies.get(self.sentiment, (self.target,))

    @property
    def unwanted(self):
        """Replies of the opposite sentiment; () outside convsent."""
        replies = {"positive": self.negative, "negative": self.positive}
        return replies.get(self.sentiment, ())


def records_folder(model="pocket", data=""):
    """The folder of the editing tasks: `data`, or editing/ beside the model or in data/ for it."""
    return Path(data) if data else beside(model, "editing")


def load_records(model="pocket", data="", split="train", seed=0):
    """{task: [EditRecord]} of every {task}_{split}.json; FileNotFoundError if there is none.

    seed draws the sentiment that each ConvSent record wants.
    """
    folder = records_folder(model, data)
    paths = {task: folder / f"{task}_{split}.json" for task in TITLES}
    records = {task: read_records(path, task, seed=seed)
               for task, path in paths.items() if path.is_file()}
    if not records:
        raise FileNotFoundError(f"{folder}: no records of an editing task for the split {split!r}")
    return records


def first_records(records, count, topics):
    """{task: the first `count` of its records}, of ConvSent the first `topics`; 0: all."""
    most = {task: topics if some[0].topic else count for task, some in records.items()}
    return {task: some[:most[task] or None] for task, some in records.items()}


def validation_records(model, data, tests, count, seed=0):
    """{task: at most `count` EditRecords that are not in tests, {task: records}}.

    They are the last of {task}_val.json, else of {task}_test.json. A task without any is left out.
    """
    folder = records_folder(model, data)
    chosen = {}
    for task, records in tests.items():
        path = folder / f"{task}_val.json"
        tested = set()
        if not path.is_file():
            path = folder / f"{task}_test.json"
            tested = {record.case_id for record in records}
        others = [record for record in read_records(path, task, seed=seed)
                  if record.case_id not in tested]
        if others:
            chosen[task] = others[-count:]
    return chosen


def read_records(path, task, seed=0):
    """Read all EditRecords of a JSON list in one task's layout; case_id is the index in the file.

    A question without answers is left out. ValueError names file and record.
    """
    if task not in READERS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(READERS)}")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a non-empty list of records")
    records = []
    for index, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"record {index}: expected an object, not {type(row).__name__}")
            records.append(READERS[task](row, task, index, seed))
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: {error}") from error
    return _with_other_topics(records) if records[0].topic else records


def edit_target(record, seed=0):
    """What an edit teaches: the record's target; ConvSent: a wanted reply, drawn with the seed."""
    return random.Random(f"{seed} target {record.task} {record.case_id}").choice(record.wanted)


def unwanted_target(record, seed=0):
    """What an edit may make less likely: an opposite reply, drawn with the seed; "" for none."""
    draw = random.Random(f"{seed} unwanted {record.task} {record.case_id}")
    return draw.choice(record.unwanted) if record.unwanted else ""


def record_as_fact(record, seed=0, opposite=False):
    """The edit of a record as a Fact, its subject marked where the prompt contains it.

    opposite: an edit of ConvSent also makes one opposite reply less likely.
    """
    target = edit_target(record, seed)
    prompt = "" if "{}" in record.prompt else marked(record.prompt, record.subject)
    subject = record.subject if prompt else record.prompt   # editors that look for one take all
    return Fact(case_id=record.case_id, subject=subject, prompt=prompt or "{}",
                target_new=target, target_true=record.old if record.old != target else "",
                unwanted=unwanted_target(record, seed) if opposite else "")


def _knowedit(row, task, case_id, seed):
    """KnowEdit's layout (Recent, WikiData_counterfact, its own zsRE)."""
    where = f"record {case_id}"
    asks = {name: _asks(row.get(name), f"{where}: {name}") for name in ("locality", "portability")}
    old = answers(row.get("ground_truth"), f"{where}: ground_truth")
    if "locality_prompt" in row:    # CounterFact in MEND's layout
        asks["locality"] += _ask("Neighborhood", row, "locality_prompt", "locality_ground_truth",
                                 where=where)
    return EditRecord(
        case_id, task, _text(row, "subject", where), _text(row, "prompt", where),
        _text(row, "target_new", where), old[0] if old else "", _rephrase(row, where), **asks)


def _zsre(row, task, case_id, seed):
    """zsRE in MEND's evaluation layout with portability, or in KnowEdit's."""
    if "src" not in row and "prompt" in row:
        return _knowedit(row, task, case_id, seed)
    where = f"record {case_id}"
    ported = row.get("portability") or {}
    if not isinstance(ported, dict):
        raise ValueError(f"{where}: portability is not an object")
    old = (answers(row.get("pred"), f"{where}: pred")           # the model's own answer
           + answers(row.get("answers"), f"{where}: answers"))
    return EditRecord(
        case_id, task, _text(row, "subject", where), _text(row, "src", where),
        _text(row, "alt", where), old[0] if old else "", _rephrase(row, where),
        locality=_ask("Unrelated", row, "loc", "loc_ans", where=where) if "loc" in row else (),
        portability=_ask("Reasoning", ported, "New Question", "New Answer", where=where)
        if "New Question" in ported else ())


def _convsent(row, task, case_id, seed):
    """ConvSent: the wanted sentiment is drawn from seed, record and topic."""
    where = f"record {case_id}"
    topic = _text(row, "ent", where)
    replies = {}
    for name in ("pos", "neg"):
        texts = row.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: {name} is not a list of texts")
        replies[name] = answers(texts, f"{where}: {name}")
        if not replies[name]:
            raise ValueError(f"{where}: {name} has no reply")
    prompt, *others = (question.replace("{}", topic) for question in QUESTIONS)
    sentiment = random.Random(f"{seed} {case_id} {topic}").choice(SENTIMENTS)
    return EditRecord(case_id, task, topic, prompt, "", rephrase=tuple(others),
                      positive=replies["pos"], negative=replies["neg"], sentiment=sentiment,
                      topic=topic)


READERS = {"recent": _knowedit, "counterfact": _knowedit, "convsent": _convsent, "zsre": _zsre}


def _with_other_topics(records):
    """ConvSent records, each with the replies to the next other topic as its locality question."""
    linked = []
    for index, record in enumerate(records):
        following = records[index + 1:] + records[:index]
        other = next((one for one in following if one.topic != record.topic), None)
        asks = (Ask("Other_Topic", other.prompt, other.positive + other.negative),) if other else ()
        linked.append(replace(record, locality=asks))
    return linked


def _text(row, name, where):
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        problem = f"no {name}" if name not in row else f"{name} is not a text, or empty"
        raise ValueError(f"{where}: {problem}")
    return clean(value, f"{where}: {name}", prompt=name in PROMPTS)


def _rephrase(row, where):
    """rephrase or rephrase_prompt: a text, a list of texts, or absent."""
    value = row.get("rephrase", row.get("rephrase_prompt")) or ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: rephrase is neither a text nor a list of texts")
    return tuple(filter(None, [clean(text, f"{where}: rephrase", prompt=True) for text in texts]))


def _ask(kind, row, question, answer, *, where):
    """The Ask of two entries of a row in a tuple, () if it has no answer."""
    prompt = _text(row, question, where)
    accepted = answers(row.get(answer), f"{where}: {answer}")
    return (Ask(kind, prompt, accepted),) if accepted else ()


def _asks(groups, where):
    """Answered Asks of {kind: [{prompt, ground_truth}]}; None is ()."""
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
            asks += _ask(kind, question, "prompt", "ground_truth", where=here)
    return tuple(asks)
