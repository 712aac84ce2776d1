"""Read facts to edit, in CounterFact's or the plain layout, and put them into published order."""

import random
from dataclasses import dataclass
from pathlib import Path

from editcore.files import flat, read_json


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to edit: with `subject` in `prompt`, the model shall continue with `target_new`."""

    case_id: int | str = 0          # unique in its file
    subject: str                    # text that replaces the {} of `prompt`
    prompt: str                     # the rewriting prompt, with exactly one {}
    target_new: str                 # wanted continuation, without leading space
    target_true: str = ""           # continuation before the edit; "" if unknown
    relation: str = ""              # e.g. P36
    paraphrases: tuple = ()         # full prompts that mean the same (texts)
    neighbours: tuple = ()          # full prompts on other subjects whose answer is target_true
    attributes: tuple = ()          # full prompts on other subjects whose answer is target_new
    generation: tuple = ()          # stubs to continue freely
    portability: tuple = ()         # (kind, prompt, (accepted answers, ...)) triples

    @property
    def text(self):
        """The rewriting prompt with its subject."""
        return self.prompt.replace("{}", self.subject)


def fact(record, case_id=None):
    """Make a Fact of a CounterFact record or a dict of prompt, subject, target_new [, target_true].

    Targets may be "str" or {"str": "…"}. ValueError names the record and what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"record {case_id}: expected an object, found {type(record).__name__}")
    case_id = record.get("case_id", case_id)
    core = record.get("requested_rewrite", record)
    if not isinstance(core, dict):
        raise ValueError(f"record {case_id}: requested_rewrite is not an object")
    missing = [name for name in ("subject", "prompt", "target_new") if name not in core]
    if missing:
        raise ValueError(f"record {case_id}: no {', '.join(missing)}")
    subject = _text(core, "subject", case_id)
    paraphrases = _texts(record, "paraphrase_prompts", case_id)
    return check(Fact(
        case_id=case_id,
        subject=subject,
        prompt=_text(core, "prompt", case_id),
        target_new=_text(core, "target_new", case_id).strip(),
        target_true=_text(core, "target_true", case_id).strip(),
        relation=str(core.get("relation_id", core.get("rel", ""))),
        paraphrases=tuple(text.replace("{}", subject) for text in paraphrases),
        neighbours=_texts(record, "neighborhood_prompts", case_id),
        attributes=_texts(record, "attribute_prompts", case_id),
        generation=_texts(record, "generation_prompts", case_id),
        portability=_portability(record, case_id),
    ))


def check(fact):
    """Return the Fact if it can be edited; else one ValueError names the record and the reason."""
    label = f"record {fact.case_id}"
    if not fact.subject.strip():
        raise ValueError(f"{label}: the subject is empty")
    if fact.prompt.count("{}") != 1:
        inside = fact.subject in fact.prompt
        reason = "must mark the subject with {}" if inside else "does not contain the subject"
        raise ValueError(f"{label}: the prompt needs exactly one {{}}; {fact.prompt!r} {reason}")
    if not fact.target_new:
        raise ValueError(f"{label}: target_new is empty")
    if fact.target_new == fact.target_true:
        raise ValueError(f"{label}: target_new equals target_true ({fact.target_new!r})")
    return fact


def read_facts(path, bad=None):
    """Read all facts of a JSON file (a list of records) in its order; ids must be unique.

    bad: None stops at the first bad record; a list collects the error texts of bad records instead,
    which are left out.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a non-empty list of facts")
    facts = {}
    for index, record in enumerate(records):
        try:
            new = fact(record, index)
            first, _ = facts.setdefault(new.case_id, (index, new))
            if first != index:
                raise ValueError(f"record {new.case_id}: case_id occurs twice "
                                 f"(records {first} and {index})")
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{Path(path).name}: {error}") from error
            bad.append(str(error))
    if not facts:
        raise ValueError(f"{path}: no usable fact among {len(records)} records; "
                         f"first problem: {bad[0]}")
    return [new for _, new in facts.values()]


def one_per_subject(facts):
    """Keep the first fact of each subject (upper and lower case alike), in order."""
    first = {}
    for fact in facts:
        first.setdefault(fact.subject.lower(), fact)
    return list(first.values())


def order(facts, key, seed=37):
    """Put facts into edit order number `key` (0, 1, …) of the published protocol, one per subject.

    One list of indices, in data set order, is shuffled in place key + 1 times by a generator with
    `seed` (arXiv 2401.07453 and its logs use 37).
    """
    unique = one_per_subject(facts)
    generator = random.Random(seed)
    indices = list(range(len(unique)))
    for _ in range(key + 1):
        generator.shuffle(indices)
    return [unique[i] for i in indices]


def _text(core, name, case_id):
    value = core.get(name, "")
    if isinstance(value, dict):
        value = value.get("str")
    if not isinstance(value, str):
        raise ValueError(f"record {case_id}: {name} is not a text")
    return value


def _texts(record, name, case_id):
    value = record.get(name, [])
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"record {case_id}: {name} is not a list of texts")
    return tuple(value)


def _portability(record, case_id):
    triples = []
    for kind, questions in (record.get("portability") or {}).items():
        if not isinstance(questions, list):
            continue    # zsRE's flat form is read by its own reader
        for question in questions:
            answers = tuple(flat(question.get("ground_truth") or []))
            if not answers:
                raise ValueError(f"record {case_id}: portability question without ground_truth")
            triples.append((kind, question["prompt"], answers))
    return tuple(triples)
