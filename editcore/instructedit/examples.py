"""An edit record and what is put before its prompts in; what a hypernetwork is trained on for it, as token ids, out."""

import random

from editcore.facts import Fact
from editcore.instructedit.hyperloss import Example, pairs

AFTER = ("edit", "rephrase")


def of(tok, record, put=str, after="edit", replies=4, seed=0):
    """The Example of an EditRecord.

    put: prompt -> prompt with the record's instruction (instructions.prefix), for all prompts but locality's.
    after: what must be likely after the edit: the "edit" itself (InstructEdit), or its "rephrase" where the record has
    one (MEND). A record without locality has none.
    ConvSent (arXiv:2402.16123): one reply of the wanted sentiment, drawn with the seed, is the edit; up to `replies`
    others must be likely after it, as many opposite ones unlikely, and as many of another topic stay. ValueError names
    the record.
    """
    if after not in AFTER:
        raise ValueError(f"after is {after!r}, but must be one of {', '.join(AFTER)}")
    draw, first = random.Random(f"{seed} example {record.task} {record.case_id}"), target(record, seed)
    others = _some(draw, [reply for reply in record.wanted if reply != first], replies) or (first,)
    prompts = record.rephrase if after == "rephrase" and record.rephrase else (record.prompt,)
    locality = [(ask.prompt, answer) for ask in record.locality for answer in _answers(draw, record, ask, replies)]
    try:
        return Example(f"{record.task} {record.case_id}", pairs(tok, [(put(record.prompt), first)]),
                       after=_said(tok, put, prompts, others), locality=pairs(tok, locality),
                       against=_said(tok, put, prompts[:1], _some(draw, record.unwanted, replies)))
    except ValueError as error:
        raise ValueError(f"{record.task} record {record.case_id}: {error}") from error


def target(record, seed=0):
    """What the edit of a record teaches: its target; ConvSent: one wanted reply, drawn with the seed."""
    return random.Random(f"{seed} target {record.task} {record.case_id}").choice(record.wanted)


def asked(record, put=str, seed=0):
    """The edit of a record as a Fact whose text is the whole prompt, for editors that read facts."""
    wanted = target(record, seed)
    return Fact(case_id=record.case_id, subject=put(record.prompt), prompt="{}", target_new=wanted,
                target_true=record.old if record.old != wanted else "")


def _said(tok, put, prompts, replies):
    """Pairs of every reply with one of the prompts; every prompt with the only one."""
    count = max(len(prompts), len(replies)) if replies else 0
    return pairs(tok, [(put(prompts[i % len(prompts)]), replies[i % len(replies)]) for i in range(count)])


def _answers(draw, record, ask, replies):
    """What is kept of a locality question: its first answer, of another topic's replies several."""
    return _some(draw, ask.answers, replies) if record.topic else ask.answers[:1]


def _some(draw, texts, count):
    """`count` of the texts, or all if there are fewer, in an order that the draw decides."""
    return tuple(draw.sample(texts, min(count, len(texts))))
