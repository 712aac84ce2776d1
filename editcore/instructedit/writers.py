"""A task and a score of descriptions in; ten descriptions, written and rewritten until no metric rises, out."""

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from editcore.files import write_json
from editcore.instructedit.instructions import SLOTS, TITLES, check_descriptions, read

# Openings and endings of the offline bank; every opening fits every ending of its task.
PHRASES = {
    "recent": (("Complete the statement with", "Finish the sentence with", "End the text with", "Write", "Give"),
               ("what is new about the subject.", "the fact that has just become true.",
                "the object that recent events gave it.", "the present knowledge about this entity.",
                "the answer as it is today.", "what the model could not know before.")),
    "counterfact": (("Complete the statement with", "Finish the sentence with", "End the text with", "Write", "Give"),
                    ("the object that takes the place of the known one.", "an answer other than the remembered one.",
                     "the changed fact about the subject.", "what is true after the edit.",
                     "the counterfactual object.", "the new answer, not the old one.")),
    "convsent": (("Talk about {topic} with", "Reply about {topic} with", "Answer on {topic} with",
                  "When the topic is {topic}, show", "On {topic}, use"),
                 ("a {sentiment} view.", "a {sentiment} attitude.", "{sentiment} feelings.",
                  "a clear {sentiment} opinion.", "{sentiment} words only.", "a way of speaking that is {sentiment}.")),
    "zsre": (("Answer the question with", "Reply to the question with", "After the question, write", "Write", "Give"),
             ("the name that it asks for.", "one short entity.", "the new right answer.",
              "the object of the relation.", "what belongs to the subject.", "very few words and no sentence.")),
}


@dataclass(frozen=True)
class Bank:
    """The offline writer: it keeps most of the best set that the prompt shows and swaps in paraphrases not tried."""

    sentences: tuple        # what it can write
    swap: int = 4           # how many of the best set it replaces at a time

    def __call__(self, prompt):
        """Ten numbered lines, the same for the same prompt."""
        best = parsed(prompt.rpartition("Best so far")[2]) if "Best so far" in prompt else []
        fresh = sorted((text for text in self.sentences if text not in prompt), key=lambda text: _rank(prompt, text))
        if not best:
            return numbered(fresh[:10])
        dropped = set(sorted(best, key=lambda text: _rank(prompt, text))[:min(self.swap, len(fresh))])
        return numbered([text for text in best if text not in dropped] + fresh[:len(dropped)])


@dataclass(frozen=True)
class Built:
    """What the loop leaves."""

    descriptions: tuple     # the set with the highest mean score
    rounds: tuple           # a dict a round: prompt, reply, descriptions, scores, which metrics rose


def bank(task, swap=4):
    """The offline writer of a task: 30 paraphrases."""
    openings, endings = PHRASES[task]
    return Bank(tuple(f"{opening} {ending}" for opening in openings for ending in endings), swap)


def endpoint(environ=None, timeout=120):
    """A writer that asks an OpenAI-compatible endpoint, or None where the environment names none.

    EDITCORE_WRITER_URL: base address (…/v1); EDITCORE_WRITER_MODEL: the model; EDITCORE_WRITER_KEY: sent as a bearer
    token if set, and to no other address (redirects are errors). The writer raises ValueError if it gets no text.
    """
    environ = os.environ if environ is None else environ
    base, model = environ.get("EDITCORE_WRITER_URL", ""), environ.get("EDITCORE_WRITER_MODEL", "")
    if not base:
        return None
    if not base.startswith(("http://", "https://")):
        raise ValueError("EDITCORE_WRITER_URL is not an http or https address")
    if not model:
        raise ValueError("EDITCORE_WRITER_URL is set: EDITCORE_WRITER_MODEL has to name the model")
    head = {"Content-Type": "application/json"}
    if environ.get("EDITCORE_WRITER_KEY"):
        head["Authorization"] = f"Bearer {environ['EDITCORE_WRITER_KEY']}"

    def write(prompt):
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
        return _reply(urllib.request.Request(f"{base.rstrip('/')}/chat/completions", body, head), timeout)
    return write


def writer_for(task, environ=None):
    """The endpoint's writer where the user configured one, else the task's bank."""
    return endpoint(environ) or bank(task)


def build(task, writer, score, rounds=5, log=None):
    """Descriptions of a task by the loop: write ten, score them, tell the writer, until a round in which nothing rises.

    writer: text → text. score: ten descriptions → {metric: number, higher is better}. A metric rises if it exceeds
    its highest value so far; the set of the highest mean is kept. log, if given, is called with every round's dict.
    """
    history, high = [], {}
    for number in range(rounds):
        prompt = request(task, history)
        reply, texts = _asked(task, writer, prompt)
        scores = {name: float(value) for name, value in score(texts).items()}
        if not scores or (high and set(scores) != set(high)):
            raise ValueError(f"{task}, round {number}: the score has metrics {sorted(scores)}, before {sorted(high)}")
        rose = [name for name, value in scores.items() if value > high.get(name, float("-inf"))]
        high |= {name: scores[name] for name in rose}
        history.append({"task": task, "round": number, "prompt": prompt, "reply": reply, "descriptions": list(texts),
                        "scores": scores, "rose": rose})
        if log is not None:
            log(history[-1])
        if not rose:
            break
    return Built(tuple(best(history)["descriptions"]), tuple(history))


def best(history):
    """The round with the highest mean score, the first of equals."""
    return max(history, key=lambda row: sum(row["scores"].values()) / len(row["scores"]))


def log_to(path):
    """A log for `build`: after every round the file holds all rounds so far, whole."""
    rows = []

    def log(row):
        rows.append(row)
        write_json(path, rows)
    return log


def request(task, history):
    """The text that asks the writer for ten descriptions: about the data, then all scores, then the best set."""
    slots = f" Each has the slots {' and '.join(SLOTS)}, once each." if task == "convsent" else ""
    text = (f"A language model is edited. Name of the editing task: {TITLES[task]}.\n"
            f"Its data: {read()[task]['about']}\n\n"
            f"Write ten different descriptions of the task for the model, one sentence each, numbered 1 to 10, "
            f"one on a line, nothing else.{slots}\n")
    if not history:
        return text
    told = "".join(f"\nRound {row['round']}, scores {_told(row['scores'])}:\n{numbered(row['descriptions'])}"
                   for row in history)
    top = best(history)
    return (f"{text}\nAn editor was trained with earlier descriptions and scored. Write ten that raise the scores.\n"
            f"{told}\nBest so far, scores {_told(top['scores'])}:\n{numbered(top['descriptions'])}")


def numbered(texts):
    """ "1. …\\n2. …\\n" of texts."""
    return "".join(f"{number}. {text}\n" for number, text in enumerate(texts, 1))


def parsed(reply):
    """The texts of the numbered or bulleted lines of a reply, quotes around them removed."""
    found = re.findall(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(\S.*?)\s*$", reply, re.M)
    return [text.strip("\"“”'* ") for text in found]


def _asked(task, writer, prompt, tries=3):
    """(reply, ten checked descriptions); an unusable reply is told to the writer and asked for again."""
    problem = ""
    for _ in range(tries):
        reply = writer(prompt + problem)
        try:
            return reply, check_descriptions(task, parsed(reply))
        except ValueError as error:
            problem, last = f"\nYour last reply could not be used: {error}. Write it again.\n", error
    raise ValueError(f"the writer gave no usable descriptions in {tries} replies; the last: {last}")


def _reply(call, timeout):
    """Text of the first choice of a chat completion; ValueError says what came instead."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
                    urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)     # build_opener would add redirects, which carry the key elsewhere
    try:
        with opener.open(call, timeout=timeout) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(f"the writer's endpoint answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"the writer's endpoint cannot be reached ({getattr(error, 'reason', error)})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the writer's endpoint gave no chat completion ({type(error).__name__})") from None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the writer's endpoint gave no text")
    return text


def _told(scores):
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _rank(prompt, text):
    """A number that orders texts differently for every prompt, the same in every process."""
    return hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()
