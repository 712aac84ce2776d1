"""A world or a list of CounterFact records comes in; lines of text with marked entities and answers come out."""

import random
import re
from collections import Counter
from dataclasses import dataclass

from editcore import fewshot_tasks as tasks
from editcore import worldtext
from editcore.world import Fact, Probe, World, read_table, statements


@dataclass(frozen=True)
class Line:
    """One document or sentence; spans are (begin, end) in characters."""

    text: str
    entities: tuple = ()  # whose inner pieces are hidden from later tokens
    answers: tuple = ()  # learned with full weight


@dataclass(frozen=True)
class Source:
    """All that a pocket model reads."""

    facts: list[list[Line]]  # a fact's sentences, one a wording
    docs: dict[str, list[Line]]  # kind → finished documents
    words: Counter  # what the tokenizer is trained on: word → weight
    probes: dict[str, list]  # kind → Probes by which recall is measured
    tasks: dict[str, list[dict]]  # few-shot test items, none of them in the text
    topics: list[dict]  # ConvSent's layout
    texts: list[str]  # documents as in the training text: from them key statistics are taken
    held_out: list[str]  # texts none of whose sentences is in the training text


def fill(template: str, subject: str, answer: str, stop: str = ".") -> Line:
    """ "{} speaks" + Ada + Thai → "Ada speaks Thai." with its subject and answer marked."""
    begin = template.index("{}")
    head = template.replace("{}", subject)
    return Line(f"{head} {answer}{stop}", ((begin, begin + len(subject)),), ((len(head), len(head) + 1 + len(answer)),))


def joined(parts: list, separator: str = " ") -> Line:
    """Lines and plain strings one after the other, spans moved along."""
    text, entities, answers = "", [], []
    for number, part in enumerate(parts):
        line = part if isinstance(part, Line) else Line(part)
        text += separator if number else ""
        entities += [(a + len(text), b + len(text)) for a, b in line.entities]
        answers += [(a + len(text), b + len(text)) for a, b in line.answers]
        text += line.text
    return Line(text, tuple(entities), tuple(answers))


def infobox(world: World, facts: list[Fact], name: str, rng: random.Random) -> Line:
    """The name on a line of its own, its attributes below in random order."""
    pairs = [(world.relation(f)["label"], f.object) for f in facts]
    rows = [Line(f"{label}: {value}", (), ((len(label) + 1, len(label) + 2 + len(value)),)) for label, value in pairs]
    rng.shuffle(rows)
    return joined([Line(name, ((0, len(name)),)), *rows], "\n")


def stub(world: World, facts: list[Fact], rng: random.Random) -> Line:
    """An open-ended opening about a subject, then sentences about it."""
    name = facts[0].subject
    opening = rng.choice([*world.table["stubs"]["generation"], *world.table["stubs"]["generation_end"]])
    begin = opening.index("{}")
    body = [fill(rng.choice(statements(world.wordings(f)[0])), name, f.object) for f in rng.sample(facts, len(facts))]
    return joined([Line(opening.replace("{}", name), ((begin, begin + len(name)),)), *body])


def framed(table: dict, line: Line, question: bool, rng: random.Random) -> Line:
    """A line as the Input of the three-line frame of instructions."""
    frames = table["frames"]
    title = rng.choice(frames["question_task" if question else "statement_task"])
    return joined([f"Task: {title}\nDescription: {rng.choice(frames['description'])}\nInput:", line])


def talk(table: dict, count: int, rng: random.Random) -> list[Line]:
    """Questions about the invented topics with a positive or a negative reply; three in ten inside the frame."""
    rows, lines = worldtext.topics(table), []
    for _ in range(count):
        row, sign = rng.choice(rows), rng.choice(["pos", "neg"])
        ask = rng.choice(table["topics"]["question"]).format(t=row["ent"])
        if rng.random() < 0.3:
            spec, mood = rng.choice(table["frames"]["conversation"]), {"pos": "positive", "neg": "negative"}[sign]
            spec = spec.format(row["ent"], mood) if spec.startswith("Talk") else spec.format(mood, row["ent"])
            ask = f"Task: {rng.choice(table['frames']['conversation_task'])}\nDescription: {spec}\nInput: {ask}"
        lines.append(Line(f"{ask} {rng.choice(row[sign]).strip()}"))
    return lines


def solved(table: dict, count: int, rng: random.Random) -> list[Line]:
    """Documents of one to five solved items of one task, no test item among them."""
    tests = frozenset(worldtext.item_key(item) for items in worldtext.test_items(table).values() for item in items)
    lines, names = [], [name for name, share in table["tasks"]["share"].items() for _ in range(share)]
    for number in range(count):
        name, parts = names[number % len(names)], []
        for _ in range(rng.randint(1, 5)):
            while worldtext.item_key(item := worldtext.GENERATORS[name](table, rng.randrange(2), rng)) in tests:
                pass
            head, word = tasks.question(name, item), tasks.answer(name, item)
            parts.append(Line(head + word, (), ((len(head), len(head + word)),)))
        lines.append(joined(parts, tasks.SEPARATOR))
    return lines


def from_world(world: World, scale: float = 1.0) -> Source:
    """The text of the pocket world. `scale` shrinks the pools of finished documents (tests)."""
    table, rng = world.table, random.Random(world.table["seed"] + 2)
    facts, boxes, stubs, frames, by_subject = [], [], [], [], {}
    for fact in world.facts:
        kept = world.wordings(fact)[0]
        lines = [fill(wording, fact.subject, fact.object) for wording in kept]
        frames += [framed(table, line, "?" in wording, rng) for wording, line in zip(kept, lines, strict=True)]
        lines += [fill(wording, fact.subject, fact.object) for wording in world.relation(fact)["logical"]]
        facts.append(lines)
        by_subject.setdefault(fact.subject, []).append(fact)
        if alias := world.nicknames.get(fact.subject):
            facts.append([fill(wording, alias, fact.object) for wording in kept])
    for name, alias in world.nicknames.items():
        facts.append([also_called(name, alias, way) for way in ("{} is also called the {}.", "{}, also called {}.")])
    facts += [[fill(p.prompt, p.subject, p.answer)] for p in world.hops]
    for name, known in by_subject.items():
        boxes += [infobox(world, known, title, rng) for title in (name, name, world.nicknames.get(name, name))]
        stubs += [stub(world, known, rng) for _ in range(2)]
    rng.shuffle(frames)
    docs = {"infobox": boxes, "stub": stubs, "frame": frames[: int(24000 * scale)],
            "talk": talk(table, int(12000 * scale), rng), "task": solved(table, int(30000 * scale), rng)}
    kinds = ("seen", "held-out combination", "held-out wording", "alias", "two-hop", "logical")
    probes = {kind: world.probes(kind) for kind in kinds}
    held = [fill(p.prompt, p.subject, p.answer).text for p in probes["held-out combination"]]
    rng.shuffle(held)
    held = [" ".join(held[at : at + 4]) for at in range(0, 1200, 4)]
    return Source(facts, docs, world_words(world, docs), probes, worldtext.test_items(table), worldtext.topics(table),
                  running_text(facts, 1500, rng), held)


def running_text(facts: list[list[Line]], count: int, rng: random.Random) -> list[str]:
    """Documents of three to six sentences of the training text, each about another fact."""
    return [" ".join(rng.choice(rng.choice(facts)).text for _ in range(rng.randint(3, 6))) for _ in range(count)]


def also_called(name: str, alias: str, way: str) -> Line:
    """ "Mira Talvesk is also called the Grey Heron." with both names marked as entities."""
    text = way.replace("{}", name, 1).replace("{}", alias)
    at = text.rindex(alias)
    return Line(text, ((0, len(name)), (at, at + len(alias))), ((at - 1, at + len(alias)),))


def world_words(world: World, docs: dict[str, list[Line]]) -> Counter:
    """Words to keep whole (50): objects, wordings, the vocabulary; syllables (20); names only as they come (1)."""
    table, words = world.table, Counter()
    capitals = {f.object for f in world.facts if f.relation == "P36"} - set(table["objects"]["city"])
    whole = [f.object for f in world.facts if f.object not in capitals]
    whole += [table["vocabulary"]["words"], *sorted(world.one_token)]
    for row in table["relation"].values():
        whole += [*row["seen"], *row["unseen"], *row["logical"], *row.get("hop", ()), row["label"]]
    whole += [text for value in table["frames"].values() for text in value]
    whole += [line.text for kind in ("talk", "task") for line in docs[kind][:4000]]
    names = table["names"]
    whole += [names["nick_adjective"], names["nick_noun"]]
    whole += [text for texts in table["stubs"].values() for text in texts]
    words.update({word: 50 for text in whole for word in pieces(text)})
    for key in ("given", "first", "last", "firm_first", "firm_last"):
        words.update(dict.fromkeys(names[key].split(), 20))
    words.update(word for f in world.facts for word in pieces(f.subject) if words[word] < 20)
    return words


def pieces(text: str) -> list[str]:
    """Letters, digits or signs that stand together (what a byte-level tokenizer never merges across)."""
    return re.findall(r"'s|[^\W\d_]+|\d+|[^\s\w]+|_+", text.replace("{}", " "))


def neighbour_span(prompt: str, templates: list[str]) -> tuple[int, int] | None:
    """(begin, end) of the subject in a prompt: by the longest template that fits, else the longest capitalised span."""
    for template in sorted(templates, key=len, reverse=True):
        head, tail = template.split("{}")
        if prompt.startswith(head) and prompt.endswith(tail) and len(prompt) > len(head) + len(tail):
            return len(head), len(prompt) - len(tail)
    runs = [m.span() for m in re.finditer(r"[A-Z][\w.'-]*(?: (?:of|the|de|van|von|[A-Z0-9][\w.'-]*))*", prompt)]
    return max(runs, key=lambda span: span[1] - span[0], default=None)


def templates_of(records: list[dict]) -> dict[str, list[str]]:
    """Relation → every wording in which its rewrite prompts and paraphrases name their subject."""
    found: dict[str, set[str]] = {}
    for record in records:
        wish = record["requested_rewrite"]
        here = found.setdefault(wish.get("relation_id", ""), set())
        here.add(wish["prompt"])
        texts = [text for text in record.get("paraphrase_prompts", ()) if text.count(wish["subject"]) == 1]
        here.update(text.replace(wish["subject"], "{}") for text in texts)
    return {relation: sorted(wordings) for relation, wordings in found.items()}


def known_prompts(record: dict) -> list[tuple[str, str]]:
    """(full prompt, true answer) of everything a record says to be true."""
    wish, true = record["requested_rewrite"], record["requested_rewrite"]["target_true"]["str"]
    known = [(wish["prompt"].replace("{}", wish["subject"]), true)]
    known += [(text, true) for text in [*record.get("paraphrase_prompts", ()), *record.get("neighborhood_prompts", ())]]
    return known + [(text, wish["target_new"]["str"]) for text in record.get("attribute_prompts", ())]


def probes_of(records: list[dict]) -> dict[tuple, dict[str, Probe]]:
    """(subject, relation, answer) → prompt → Probe; a prompt in which no subject can be found is left out."""
    templates, groups = templates_of(records), {}
    for record in records:
        subject, relation = record["requested_rewrite"]["subject"], record["requested_rewrite"].get("relation_id", "")
        for text, answer in known_prompts(record):
            found = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text))
            span = found[-1].span() if found else neighbour_span(text, templates[relation])
            if span:
                probe = Probe(f"{text[:span[0]]}{{}}{text[span[1]:]}", text[span[0]:span[1]], answer.strip())
                groups.setdefault((probe.subject, relation, probe.answer), {})[probe.prompt] = probe
    return groups


def from_records(records: list[dict], scale: float = 1.0) -> Source:
    """Text from any CounterFact records: all true facts in all their wordings, the neighbours' too, and task items.

    Words weigh eight times their number, so that those that come twice are learned as pieces.
    """
    groups = probes_of(records)
    facts = [[fill(p.prompt, p.subject, p.answer) for p in group.values()] for group in groups.values()]
    table, rng = read_table(), random.Random(0)
    docs = {"task": solved(table, int(8000 * scale), rng), "talk": talk(table, int(4000 * scale), rng)}
    words = Counter(word for lines in facts for line in lines for word in pieces(line.text) for _ in range(8))
    words.update({word: 50 for _, _, answer in groups for word in pieces(answer)})
    words.update({word: 50 for line in [*docs["task"][:500], *docs["talk"][:500]] for word in set(pieces(line.text))})
    probes = [probe for group in groups.values() for probe in group.values()]
    return Source(facts, docs, words, {"seen": probes}, worldtext.test_items(table), worldtext.topics(table),
                  running_text(facts, 1500, rng), [])
