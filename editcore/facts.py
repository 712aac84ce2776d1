"""Files of facts in CounterFact's or the plain layout in, checked Fact records out."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from editcore.files import read_json


@dataclass(frozen=True)
class Fact:
    """One thing to edit: fill `subject` into `prompt`, and the model shall continue with `target_new`."""

    case_id: int | str              # unique in its file
    subject: str                    # text that replaces the {} of `prompt`
    prompt: str                     # the rewriting prompt, with exactly one {}
    target_new: str                 # wanted continuation, without leading space
    target_true: str = ""           # continuation before the edit; "" if unknown
    relation: str = ""              # e.g. P36
    paraphrases: tuple = ()         # full prompts that mean the same (strings)
    neighbours: tuple = ()          # full prompts on other subjects whose answer is target_true
    attributes: tuple = ()          # full prompts on other subjects whose answer is target_new
    generation: tuple = ()          # stubs to continue freely
    portability: tuple = ()         # (kind, prompt, (accepted answers, ...)) triples

    @property
    def text(self):
        """The rewriting prompt with its subject."""
        return self.prompt.replace("{}", self.subject)


def fact(record, case_id=None):
    """A Fact of a dict: a CounterFact record, or {"prompt", "subject", "target_new", ["target_true"]}.

    Targets may be "str" or {"str": "…"}; raises ValueError naming the record and what is wrong with it.
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
    made = Fact(case_id=case_id, subject=_text(core, "subject", case_id), prompt=_text(core, "prompt", case_id),
                target_new=_text(core, "target_new", case_id).strip(),
                target_true=_text(core, "target_true", case_id).strip() if "target_true" in core else "",
                relation=str(core.get("relation_id", core.get("rel", ""))),
                paraphrases=_texts(record, "paraphrase_prompts", case_id),
                neighbours=_texts(record, "neighborhood_prompts", case_id),
                attributes=_texts(record, "attribute_prompts", case_id),
                generation=_texts(record, "generation_prompts", case_id), portability=_portability(record, case_id))
    return checked(replace(made, paraphrases=tuple(p.replace("{}", made.subject) for p in made.paraphrases)))


def checked(one):
    """The Fact itself if it can be edited; else one ValueError that names the record and the reason."""
    if not one.subject.strip():
        raise ValueError(f"record {one.case_id}: the subject is empty")
    if one.prompt.count("{}") != 1:
        found = "does not contain the subject" if one.subject not in one.prompt else "must mark the subject with {}"
        raise ValueError(f"record {one.case_id}: the prompt needs exactly one {{}}; {one.prompt!r} {found}")
    if not one.target_new:
        raise ValueError(f"record {one.case_id}: target_new is empty")
    if one.target_new == one.target_true:
        raise ValueError(f"record {one.case_id}: target_new equals target_true ({one.target_new!r})")
    return one


def read_facts(path, bad=None):
    """All facts of a JSON file (a list of records), in file order, ids checked to be unique.

    bad: None stops at the first bad record; a list gets the error texts instead, and the records are left out.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a non-empty list of facts")
    facts, seen = [], {}
    for index, record in enumerate(records):
        try:
            one = fact(record, index)
            if one.case_id in seen:
                first = seen[one.case_id]
                raise ValueError(f"record {one.case_id}: case_id occurs twice (records {first} and {index})")
            seen[one.case_id] = index
            facts.append(one)
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{Path(path).name}: {error}") from error
            bad.append(str(error))
    if not facts:
        raise ValueError(f"{path}: no usable fact among {len(records)} records; first problem: {bad[0]}")
    return facts


def one_per_subject(facts):
    """The facts whose lower-cased subject has not occurred before, in order."""
    seen = set()
    return [one for one in facts if not (one.subject.lower() in seen or seen.add(one.subject.lower()))]


def order(facts, key, seed=37):
    """Edit order number `key` (0, 1, …) of the published protocol: one list, shuffled in place key + 1 times.

    The list holds as many indices as there are distinct subjects; it starts in data set order, the generator with
    `seed` (arXiv 2401.07453 and its logs use 37).
    """
    unique = one_per_subject(facts)
    draw = random.Random(seed)
    indices = list(range(len(unique)))
    for _ in range(key + 1):
        draw.shuffle(indices)
    return [unique[i] for i in indices]


def _text(core, name, case_id):
    value = core[name]
    if isinstance(value, dict):
        value = value.get("str")
    if not isinstance(value, str):
        raise ValueError(f"record {case_id}: {name} is not a text")
    return value


def _texts(record, name, case_id):
    value = record.get(name, ())
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"record {case_id}: {name} is not a list of texts")
    return tuple(value)


def _portability(record, case_id):
    triples = []
    for kind, questions in (record.get("portability") or {}).items():
        if not isinstance(questions, list):
            continue  # zsRE's flat form is read by its own reader
        for question in questions:
            answers = question.get("ground_truth")
            answers = [answers] if isinstance(answers, str) else [a for group in answers or [] for a in
                                                                  ([group] if isinstance(group, str) else group)]
            if not answers:
                raise ValueError(f"record {case_id}: portability question without ground_truth")
            triples.append((kind, question["prompt"], tuple(answers)))
    return tuple(triples)
