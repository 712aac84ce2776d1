"""Read facts to edit, in CounterFact's or the plain layout, and put them into published order."""

import random
import re
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path

from editcore.files import read_json

LONGEST = 100_000       # characters of one text
# Characters of scripts that are written without blanks between words: Thai, Lao, Burmese, Khmer,
# Chinese, Japanese and their punctuation.
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3001-\u312f\u3190-\u31ff"
            "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff60\uff66-\uff9f"
            "\U0001b000-\U0001b16f\U00020000-\U0003ffff")
INVISIBLE = re.compile("[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
NO_BREAK = re.compile("[\u00a0\u2007\u202f]")
BROKEN = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\0-\b\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to edit: with `subject` in `prompt`, the model shall continue with `target_new`.

    All its texts pass `clean`; ValueError names the record and the field that cannot be read.
    """

    case_id: int | str = 0          # unique in its file
    subject: str                    # text that replaces the {} of `prompt`
    prompt: str                     # the rewriting prompt, with exactly one {}
    target_new: str                 # wanted continuation, without leading space
    target_true: str = ""           # continuation before the edit; "" if unknown
    unwanted: str = ""              # continuation that trained editors make less likely; "": none
    relation: str = ""              # e.g. P36
    paraphrases: tuple = ()         # full prompts that mean the same (texts)
    neighbours: tuple = ()          # full prompts on other subjects whose answer is target_true
    attributes: tuple = ()          # full prompts on other subjects whose answer is target_new
    generation: tuple = ()          # stubs to continue freely
    portability: tuple = ()         # (kind, prompt, (accepted answers, ...)) triples

    def __post_init__(self):
        for field in fields(self)[1:]:
            label = f"record {self.case_id}: {field.name}"
            value = _cleaned(getattr(self, field.name), label, field.name not in SHORT)
            object.__setattr__(self, field.name, value)

    @property
    def text(self):
        """The rewriting prompt with its subject."""
        return self.prompt.replace("{}", self.subject)


SHORT = ("subject", "target_new", "target_true", "unwanted", "relation")


def clean(text, label, *, prompt=False):
    """Return a text as it is tokenised: without blanks, byte order marks and the like at its ends.

    Invisible marks inside are left out too, no-break blanks become blanks. prompt: line breaks at
    the end stay. ValueError begins with `label`: control characters, half a surrogate pair, too
    long.
    """
    if not isinstance(text, str):
        raise ValueError(f"{label} is not a text, but {type(text).__name__}")
    if len(text) > LONGEST:
        raise ValueError(f"{label} has {len(text):,} characters; at most {LONGEST:,} are read")
    text = NO_BREAK.sub(" ", INVISIBLE.sub("", text)).replace("\r\n", "\n")
    bare = text.strip().strip("\u200c\u200d").strip()
    if prompt:
        bare += "\n" * text[text.rfind(bare) + len(bare):].count("\n")
    if match := BROKEN.search(bare) or CONTROL.search(bare):
        kind = "half a surrogate pair" if BROKEN.match(match.group()) else "a control character"
        raise ValueError(f"{label} has {kind}, {match.group()!r}")
    return bare


def same(text, other):
    """Say whether two texts differ at most in how Unicode composes their characters."""
    return unicodedata.normalize("NFKC", text) == unicodedata.normalize("NFKC", other)


def marked(prompt, subject):
    """Return a prompt with {} in place of the last whole word `subject`; "" if it has none."""
    word = rf"[^\W{UNSPACED}]"
    before = rf"(?<!{word})" if re.match(word, subject) else ""
    after = rf"(?!{word})" if re.match(word, subject[-1:]) else ""
    places = list(re.finditer(before + re.escape(subject) + after, prompt)) if subject else []
    return f"{prompt[:places[-1].start()]}{{}}{prompt[places[-1].end():]}" if places else ""


def fact(record, case_id=None):
    """Make a Fact of a CounterFact record or a dict of prompt, subject, target_new [, target_true].

    Targets may be "str" or {"str": "…"}; null means absent; MEND's layout (rephrase_prompt,
    locality_prompt) is read too. ValueError names the record and what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"record {case_id}: expected an object, found {type(record).__name__}")
    record = {name: value for name, value in record.items() if value is not None}
    case_id = _case_id(record.get("case_id", case_id), case_id)
    label = f"record {case_id}"
    core = record.get("requested_rewrite", record)
    if not isinstance(core, dict):
        raise ValueError(f"{label}: requested_rewrite is not an object")
    missing = [name for name in ("subject", "prompt", "target_new") if core.get(name) is None]
    if missing:
        raise ValueError(f"{label}: no {', '.join(missing)}")
    texts = {name: _text(core, name, label)
             for name in ("subject", "prompt", "target_new", "target_true")}
    lists = {field: _texts(record, name, label)
             for field, name in (("paraphrases", "paraphrase_prompts"),
                                 ("neighbours", "neighborhood_prompts"),
                                 ("attributes", "attribute_prompts"),
                                 ("generation", "generation_prompts"))}
    if {"rephrase_prompt", "locality_prompt"} & record.keys():
        texts, lists = _mend(record, texts, lists, label)
    subject = texts["subject"]
    lists["paraphrases"] = tuple(text.replace("{}", subject) for text in lists["paraphrases"])
    return check(Fact(case_id=case_id, **texts, **lists,
                      relation=str(core.get("relation_id", core.get("rel", ""))),
                      portability=_portability(record.get("portability", {}), label)))


def check(fact):
    """Return the Fact if it can be edited; else one ValueError names the record and the reason."""
    label = f"record {fact.case_id}"
    if not fact.subject:
        raise ValueError(f"{label}: the subject is empty")
    if "{}" in fact.subject:
        raise ValueError(f"{label}: the subject {fact.subject!r} contains {{}}, which marks it")
    if fact.prompt.count("{}") != 1:
        inside = fact.subject in fact.prompt
        reason = "must mark the subject with {}" if inside else "does not contain the subject"
        raise ValueError(f"{label}: the prompt needs exactly one {{}}; {fact.prompt!r} {reason}")
    if not fact.target_new:
        raise ValueError(f"{label}: target_new is empty")
    if same(fact.target_new, fact.target_true):
        raise ValueError(f"{label}: target_new equals target_true ({fact.target_new!r})")
    for name in ("neighbours", "attributes", "generation", "portability"):
        texts = getattr(fact, name)
        if any("{}" in (text[1] if name == "portability" else text) for text in texts):
            raise ValueError(f"{label}: {name}: a full prompt is needed, without {{}}")
    return fact


def check_agreement(facts):
    """ValueError if two facts want different new answers after the same prompt."""
    first = {}
    for fact in facts:
        other = first.setdefault(fact.text, fact)
        if not same(fact.target_new, other.target_new):
            raise ValueError(f"records {other.case_id} and {fact.case_id} want "
                             f"{other.target_new!r} and {fact.target_new!r} after the same prompt, "
                             f"{fact.text!r:.80}; leave one out, or edit one after the other")


def read_facts(path, bad=None):
    """Read all facts of a file in its order: a JSON list of records, or JSON Lines.

    bad: None stops at the first bad record; a list collects the error texts of bad records instead.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a non-empty list of facts")
    facts = {}
    for index, record in enumerate(records):
        try:
            new = fact(record, index)
            first, _ = facts.setdefault(str(new.case_id), (index, new))
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

    One list of indices is shuffled in place key + 1 times (arXiv 2401.07453; its logs: seed 37).
    """
    unique = one_per_subject(facts)
    generator = random.Random(seed)
    indices = list(range(len(unique)))
    for _ in range(key + 1):
        generator.shuffle(indices)
    return [unique[i] for i in indices]


def answers(value, label):
    """Return every text in a text, a list of texts or lists of aliases, cleaned, once each."""
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{label} is neither a text nor a list of texts, but {value!r:.60}")
    texts = []
    for part in values:
        texts += part if isinstance(part, (list, tuple)) else [part]
    return tuple(dict.fromkeys(filter(None, [clean(text, label) for text in texts])))


def _cleaned(value, label, prompt):
    """A field of a Fact with all texts in it cleaned; texts in a list must not be empty."""
    if isinstance(value, str):
        return clean(value, label, prompt=prompt)
    if label.endswith("portability"):
        return tuple((kind, _filled(text, label), answers(list(wanted), label))
                     for kind, text, wanted in value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{label} is not a text, but {type(value).__name__}")
    return tuple(_filled(text, label) for text in value)


def _filled(text, label):
    text = clean(text, label, prompt=True)
    if not text.strip():
        raise ValueError(f"{label}: a text is empty")
    return text


def _case_id(value, index):
    if value is None:
        return 0
    label = f"record {index}: case_id"
    if isinstance(value, str) and value.strip():
        return clean(value, label)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{label} must be a number or a text, found {value!r:.60}")
    return value


def _text(core, name, label):
    value = core.get(name)
    if isinstance(value, dict):
        value = value.get("str")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{label}: {name} is not a text, but {value!r:.60}")
    return clean(value, f"{label}: {name}", prompt=name == "prompt")


def _texts(record, name, label):
    value = record.get(name, [])
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{label}: {name} is not a list of texts")
    return tuple(value)


def _mend(record, texts, lists, label):
    """(texts, lists) of a record in MEND's layout: full prompts, one of locality."""
    prompt = texts["prompt"]
    true = texts["target_true"] or _text(record, "ground_truth", label)
    texts = texts | {"target_true": true, "prompt": prompt if "{}" in prompt
                     else marked(prompt, texts["subject"]) or prompt}
    if isinstance(record.get("rephrase_prompt"), str):
        record = record | {"rephrase_prompt": [record["rephrase_prompt"]]}
    rephrase = _texts(record, "rephrase_prompt", label)
    lists = lists | {"paraphrases": lists["paraphrases"] + rephrase}
    if "locality_prompt" in record:
        answer = _text(record, "locality_ground_truth", label)
        if not same(answer, true):
            raise ValueError(f"{label}: locality_ground_truth is {answer!r}, but a neighbour's "
                             f"answer is target_true, {true!r}")
        near = (_text(record, "locality_prompt", label),)
        lists = lists | {"neighbours": lists["neighbours"] + near}
    return texts, lists


def _portability(groups, label):
    """Triples of {kind: [{prompt, ground_truth}]}, or of zsRE's {New Question, New Answer}."""
    label = f"{label}: portability"
    if isinstance(groups, dict) and "New Question" in groups:
        groups = {"Reasoning": [{"prompt": groups["New Question"],
                                 "ground_truth": groups.get("New Answer")}]}
    if not isinstance(groups, dict):
        raise ValueError(f"{label} is not an object, but {groups!r:.60}")
    triples = []
    for kind, questions in groups.items():
        if not isinstance(questions or [], list):
            raise ValueError(f"{label}: {kind} is not a list of questions")
        for question in questions or []:
            if not isinstance(question, dict) or not isinstance(question.get("prompt"), str):
                raise ValueError(f"{label}: {kind}: a question needs a prompt, a text; found "
                                 f"{question!r:.60}")
            wanted = answers(question.get("ground_truth"), f"{label}: {kind}: ground_truth")
            if not wanted:
                raise ValueError(f"{label}: {kind}: a question without ground_truth")
            triples.append((kind, question["prompt"], wanted))
    return tuple(triples)
