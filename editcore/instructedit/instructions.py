"""Put an instruction before the prompts of an edit: Task, Description, Input (arXiv:2402.16123)."""

import functools
import os
import random
import re
import tomllib
from dataclasses import replace
from pathlib import Path

from editcore import web

FILE = Path(__file__).resolve().parents[2] / "data" / "instructions.toml"
TITLES = {"recent": "Recent", "counterfact": "CounterFact", "convsent": "ConvSent", "zsre": "ZsRE"}
SEEN = 9        # descriptions 0 to 8 may be trained with; 9 is kept for the test
SLOTS = ("{sentiment}", "{topic}")  # of ConvSent's descriptions


@functools.cache
def read(path=FILE):
    """{task: {"about": what its data are, "descriptions": ten texts}}."""
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def descriptions():
    """{task: ten descriptions} of the study."""
    return {task: tuple(entry["descriptions"]) for task, entry in read().items()}


def add_instruction(record, number, style="full", texts=None):
    """The record with its instruction before all prompts but those of locality questions.

    number: which description; style: a key of STYLES; texts: {task: descriptions}, by default those
    of the study.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    title, description = STYLES[style](record, number, texts or descriptions())
    lines = [f"{name}: {text}\n" for name, text in (("Task", title), ("Description", description))
             if text]
    head = "".join(lines) + "Input: " if lines else ""
    asks = tuple(replace(ask, prompt=head + ask.prompt) for ask in record.portability)
    return replace(record, prompt=head + record.prompt, portability=asks,
                   rephrase=tuple(head + prompt for prompt in record.rephrase))


def draw(record, seed=0, count=SEEN):
    """Draw which of the first `count` descriptions a record gets."""
    return random.Random(f"{seed} {record.task} {record.case_id}").randrange(count)


def check_descriptions(task, texts, count=10):
    """Return `count` descriptions of a task as a tuple; ValueError says what is wrong with them."""
    texts = tuple(" ".join(text.split()) for text in texts)
    if len(texts) != count or len(set(texts)) != count:
        raise ValueError(f"{task}: {len(set(texts))} different descriptions, needed are {count}")
    for text in texts:
        bare = text
        for slot in SLOTS if task == "convsent" else ():
            if text.count(slot) != 1:
                raise ValueError(f"{task}: {text!r} needs {slot} once")
            bare = bare.replace(slot, "")
        if set(bare) & set("{}"):
            raise ValueError(f"{task}: {text!r} has a slot that nothing fills")
        if not 3 <= len(text.split()) <= 40:
            raise ValueError(f"{task}: {text!r} has {len(text.split())} words, not 3 to 40")
    return texts


def ask_writer(endpoint, writer, request, *, seconds=60):
    """Return the lines that a chat model writes; ValueError says why not, without its key.

    endpoint: https address with OpenAI's interface; writer: the model's name. The key is read from
    the environment variable WRITER_KEY, sent to the endpoint alone and shown nowhere.
    """
    key = os.environ.get("WRITER_KEY", "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("WRITER_KEY: " + ("is not a plain word: a blank, a line break or another "
                                           "character stands in it" if key else "is not set"))
    if set(endpoint) & set("?#"):
        raise ValueError("endpoint: give the address alone; a key belongs into WRITER_KEY")
    place = endpoint.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    chat = {"model": writer, "messages": [{"role": "user", "content": request}]}
    answer = web.post(f"{place}/v1/chat/completions", chat, key=key, seconds=seconds)
    try:
        text = answer["choices"][0]["message"]["content"]
        lines = [line.strip(" -*") for line in text.splitlines() if line.strip()]
    except (LookupError, TypeError, AttributeError):
        raise ValueError("the writer's answer is not that of a chat model") from None
    if key in text:
        raise ValueError("the writer's answer repeats its key")
    return lines


def _full(record, number, texts):
    """The published instruction: title and description."""
    return TITLES[record.task], _filled(record, record.task, number, record.sentiment, texts)


def _swapped(record, number, texts):
    """That of the next task; its slots say a sentiment that the record does not want."""
    tasks = list(TITLES)
    other = tasks[(tasks.index(record.task) + 1) % len(tasks)]
    wrong = {"positive": "negative"}.get(record.sentiment, "positive")
    return TITLES[other], _filled(record, other, number, wrong, texts)


def _random(record, number, texts):
    """Words of all descriptions in a random order that the task alone decides."""
    words = " ".join([" ".join(part) for part in texts.values()]).split()
    words = {word.strip(".,;:") for word in words if not set(word) & set("{}")}
    drawn = random.Random(f"words {record.task}").sample(sorted(words), 13)
    return drawn[0].capitalize(), " ".join(drawn[1:]).capitalize() + "."


def _filled(record, task, number, sentiment, texts):
    """Description `number` of a task, with ConvSent's slots filled."""
    if not 0 <= number < len(texts[task]):
        raise ValueError(f"{task} has descriptions 0 to {len(texts[task]) - 1}, not {number}")
    text = texts[task][number].replace("{sentiment}", sentiment)
    return text.replace("{topic}", record.topic or record.subject)


# style -> function of (record, number, texts) that gives (title, description)
STYLES = {
    "full": _full,
    "none": lambda *_: ("", ""),
    "task": lambda *args: (_full(*args)[0], ""),
    "description": lambda *args: ("", _full(*args)[1]),
    "constant": lambda *_: ("Knowledge Editing", "Complete the input as the edit says."),
    "random": _random,
    "swapped": _swapped,
}
