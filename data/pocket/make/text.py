"""Write the pocket model's training text: lines with their names and answers marked."""

import random
import re
from collections import Counter
from dataclasses import dataclass

import items
from editcore import fewshot
from world import KINDS, Probe, Triple, World, read_table, statements


@dataclass(frozen=True)
class Line:
    """One document or sentence; spans are (begin, end) in characters."""

    text: str
    entities: tuple = ()    # names, whose inner pieces are hidden from later tokens
    answers: tuple = ()     # learned with full weight


@dataclass(frozen=True)
class Source:
    """All that a pocket model reads, and what it is tested on."""

    facts: list[list[Line]]         # a fact's sentences, one per wording
    docs: dict[str, list[Line]]     # kind -> finished documents
    words: Counter                  # what the tokenizer is trained on: word -> weight
    probes: dict[str, list[Probe]]  # kind -> prompts by which recall is measured
    tasks: dict[str, list[dict]]    # few-shot test items, none of them in the text
    topics: list[dict]              # ConvSent's layout
    texts: list[str]                # documents as in the training text, for second moments
    held_out: list[str]             # texts none of whose sentences is in the training text


def fill(template: str, subject: str, answer: str) -> Line:
    """Turn "{} speaks", Ada, Thai into "Ada speaks Thai." with its subject and answer marked."""
    begin = template.index("{}")
    head = template.replace("{}", subject)
    entity = (begin, begin + len(subject))
    return Line(f"{head} {answer}.", (entity,), ((len(head), len(head) + 1 + len(answer)),))


def join(parts: list, separator: str = " ") -> Line:
    """Put lines and plain strings one after the other, their spans moved along."""
    text = ""
    entities = []
    answers = []
    for number, part in enumerate(parts):
        line = part if isinstance(part, Line) else Line(part)
        text += separator if number else ""
        entities += [(begin + len(text), end + len(text)) for begin, end in line.entities]
        answers += [(begin + len(text), end + len(text)) for begin, end in line.answers]
        text += line.text
    return Line(text, tuple(entities), tuple(answers))


def infobox(world: World, facts: list[Triple], name: str, rng: random.Random) -> Line:
    """The name on a line, its attributes below in random order."""
    rows = []
    for fact in facts:
        label = world.relation(fact)["label"]
        text = f"{label}: {fact.object}"
        rows.append(Line(text, (), ((len(label) + 1, len(text)),)))
    rng.shuffle(rows)
    return join([Line(name, ((0, len(name)),)), *rows], "\n")


def opening_stubs(table: dict) -> list[str]:
    """The open-ended openings about a subject."""
    return [*table["stubs"]["generation"], *table["stubs"]["generation_end"]]


def stub(world: World, facts: list[Triple], rng: random.Random) -> Line:
    """An open-ended opening about a subject, then sentences about it."""
    name = facts[0].subject
    opening = rng.choice(opening_stubs(world.table))
    begin = opening.index("{}")
    head = Line(opening.replace("{}", name), ((begin, begin + len(name)),))
    body = []
    for fact in rng.sample(facts, len(facts)):
        wording = rng.choice(statements(world.wordings(fact)[0]))
        body.append(fill(wording, name, fact.object))
    return join([head, *body])


def framed(table: dict, line: Line, question: bool, rng: random.Random) -> Line:
    """A line as the Input of the three-line frame of instructions."""
    frames = table["frames"]
    title = rng.choice(frames["question_task" if question else "statement_task"])
    description = rng.choice(frames["description"])
    return join([f"Task: {title}\nDescription: {description}\nInput:", line])


def talk(table: dict, count: int, rng: random.Random) -> list[Line]:
    """Questions about topics with a positive or negative reply; three in ten inside the frame."""
    topics = items.topics(table)
    frames = table["frames"]
    lines = []
    for _ in range(count):
        topic = rng.choice(topics)
        sign = rng.choice(["pos", "neg"])
        name = topic["ent"]
        ask = rng.choice(table["topics"]["question"]).format(t=name)
        if rng.random() < 0.3:
            wish = rng.choice(frames["conversation"])
            mood = {"pos": "positive", "neg": "negative"}[sign]
            wish = wish.format(name, mood) if wish.startswith("Talk") else wish.format(mood, name)
            title = rng.choice(frames["conversation_task"])
            ask = f"Task: {title}\nDescription: {wish}\nInput: {ask}"
        lines.append(Line(f"{ask} {rng.choice(topic[sign]).strip()}"))
    return lines


def solved(table: dict, count: int, rng: random.Random) -> list[Line]:
    """Documents of one to five solved items of one task, no test item among them."""
    test_items = [item for rows in items.held_out_items(table).values() for item in rows]
    tests = frozenset(items.item_key(item) for item in test_items)
    tasks = [task for task, share in table["tasks"]["share"].items() for _ in range(share)]
    lines = []
    for number in range(count):
        task = tasks[number % len(tasks)]
        parts = []
        for _ in range(rng.randint(1, 5)):
            item = items.GENERATORS[task](table, rng.randrange(2), rng)
            while items.item_key(item) in tests:
                item = items.GENERATORS[task](table, rng.randrange(2), rng)
            head = fewshot.question(task, item)
            text = head + fewshot.answer(task, item)
            parts.append(Line(text, (), ((len(head), len(text)),)))
        lines.append(join(parts, fewshot.SEPARATOR))
    return lines


def from_world(world: World, scale: float = 1.0) -> Source:
    """Write the text of the pocket world. `scale` shrinks the pools of finished documents."""
    table = world.table
    rng = random.Random(table["seed"] + 2)
    facts, frames = sentences(world, rng)
    boxes = []
    stubs = []
    by_subject: dict[str, list[Triple]] = {}
    for fact in world.facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    for name, known in by_subject.items():
        titles = (name, name, world.nicknames.get(name, name))
        boxes += [infobox(world, known, title, rng) for title in titles]
        stubs += [stub(world, known, rng) for _ in range(2)]
    rng.shuffle(frames)
    docs = {"infobox": boxes, "stub": stubs, "frame": frames[: int(24000 * scale)],
            "talk": talk(table, int(12000 * scale), rng),
            "task": solved(table, int(30000 * scale), rng)}
    words = world_words(world, docs)
    probes = {kind: world.probes(kind) for kind in KINDS}
    held_out = held_out_text(probes["held-out combination"], rng)
    return Source(facts, docs, words, probes, items.held_out_items(table), items.topics(table),
                  running_text(facts, 1500, rng), held_out)


def sentences(world: World, rng: random.Random) -> tuple[list[list[Line]], list[Line]]:
    """(each fact's sentences, nicknames' and two-step ones among them; the same lines framed)."""
    facts = []
    frames = []
    for fact in world.facts:
        wordings = world.wordings(fact)[0]
        lines = [fill(wording, fact.subject, fact.object) for wording in wordings]
        for wording, line in zip(wordings, lines, strict=True):
            frames.append(framed(world.table, line, "?" in wording, rng))
        logical = world.relation(fact)["logical"]
        facts.append(lines + [fill(wording, fact.subject, fact.object) for wording in logical])
        if alias := world.nicknames.get(fact.subject):
            facts.append([fill(wording, alias, fact.object) for wording in wordings])
    for name, alias in world.nicknames.items():
        ways = ("{} is also called the {}.", "{}, also called {}.")
        facts.append([also_called(name, alias, way) for way in ways])
    return facts + [[fill(hop.prompt, hop.subject, hop.answer)] for hop in world.hops], frames


def held_out_text(probes: list[Probe], rng: random.Random) -> list[str]:
    """300 texts of four sentences each that are in no training text."""
    texts = [fill(probe.prompt, probe.subject, probe.answer).text for probe in probes]
    rng.shuffle(texts)
    return [" ".join(texts[at:at + 4]) for at in range(0, 1200, 4)]


def running_text(facts: list[list[Line]], count: int, rng: random.Random) -> list[str]:
    """Documents of three to six sentences of the training text, each about another fact."""
    documents = []
    for _ in range(count):
        drawn = [rng.choice(rng.choice(facts)).text for _ in range(rng.randint(3, 6))]
        documents.append(" ".join(drawn))
    return documents


def also_called(name: str, alias: str, way: str) -> Line:
    """"Mira Talvesk is also called the Grey Heron." with both names marked."""
    text = way.replace("{}", name, 1).replace("{}", alias)
    at = text.rindex(alias)
    return Line(text, ((0, len(name)), (at, at + len(alias))), ((at - 1, at + len(alias)),))


def world_words(world: World, docs: dict[str, list[Line]]) -> Counter:
    """{word: weight}: objects and wordings whole (50), syllables (20), names as they come (1)."""
    table = world.table
    names = table["names"]
    capitals = {fact.object for fact in world.facts if fact.relation == "P36"}
    capitals -= set(table["objects"]["city"])
    whole = [fact.object for fact in world.facts if fact.object not in capitals]
    whole += [table["vocabulary"]["words"], *world.one_token]
    for row in table["relation"].values():
        whole += [*row["seen"], *row["unseen"], *row["logical"], *row.get("hop", ()), row["label"]]
    whole += [text for texts in table["frames"].values() for text in texts]
    whole += [line.text for kind in ("talk", "task") for line in docs[kind][:4000]]
    whole += [names["nick_adjective"], names["nick_noun"], *opening_stubs(table)]
    words = Counter({word: 50 for text in whole for word in pieces(text)})
    for key in ("given", "first", "last", "firm_first", "firm_last"):
        words.update(dict.fromkeys(names[key].split(), 20))
    subjects = [word for fact in world.facts for word in pieces(fact.subject)]
    words.update(word for word in subjects if words[word] < 20)
    return words


def pieces(text: str) -> list[str]:
    """Letters, digits or signs that stand together (what a byte-level tokenizer never joins)."""
    return re.findall(r"'s|[^\W\d_]+|\d+|[^\s\w]+|_+", text.replace("{}", " "))


def neighbour_span(prompt: str, templates: list[str]) -> tuple[int, int] | None:
    """(begin, end) of a prompt's subject: by the longest fitting template, else by capitals."""
    for template in sorted(templates, key=len, reverse=True):
        head, tail = template.split("{}")
        fits = prompt.startswith(head) and prompt.endswith(tail)
        if fits and len(prompt) > len(head) + len(tail):
            return len(head), len(prompt) - len(tail)
    capitalised = r"[A-Z][\w.'-]*(?: (?:of|the|de|van|von|[A-Z0-9][\w.'-]*))*"
    spans = [match.span() for match in re.finditer(capitalised, prompt)]
    return max(spans, key=lambda span: span[1] - span[0], default=None)


def templates_of(records: list[dict]) -> dict[str, list[str]]:
    """{relation: every wording in which its rewrite prompts and paraphrases name their subject}."""
    wordings: dict[str, set[str]] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        subject = rewrite["subject"]
        group = wordings.setdefault(rewrite.get("relation_id", ""), set())
        group.add(rewrite["prompt"])
        for text in record.get("paraphrase_prompts", ()):
            if text.count(subject) == 1:
                group.add(text.replace(subject, "{}"))
    return {relation: sorted(group) for relation, group in wordings.items()}


def known_prompts(record: dict) -> list[tuple[str, str]]:
    """(full prompt, true answer) of everything a record says to be true."""
    rewrite = record["requested_rewrite"]
    texts = [rewrite["prompt"].replace("{}", rewrite["subject"]),
             *record.get("paraphrase_prompts", ()), *record.get("neighborhood_prompts", ())]
    known = [(text, rewrite["target_true"]["str"]) for text in texts]
    attributes = record.get("attribute_prompts", ())
    return known + [(text, rewrite["target_new"]["str"]) for text in attributes]


def probes_of(records: list[dict]) -> dict[tuple, dict[str, Probe]]:
    """{(subject, relation, answer): {prompt: Probe}} of the prompts that show their subject."""
    templates = templates_of(records)
    groups: dict[tuple, dict[str, Probe]] = {}
    for record in records:
        subject = record["requested_rewrite"]["subject"]
        relation = record["requested_rewrite"].get("relation_id", "")
        for text, answer in known_prompts(record):
            places = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text))
            span = places[-1].span() if places else neighbour_span(text, templates[relation])
            if span:
                begin, end = span
                probe = Probe(f"{text[:begin]}{{}}{text[end:]}", text[begin:end], answer.strip())
                group = groups.setdefault((probe.subject, relation, probe.answer), {})
                group[probe.prompt] = probe
    return groups


def from_records(records: list[dict], scale: float = 1.0) -> Source:
    """Write text from any CounterFact records: true facts in all their wordings, and task items.

    Words weigh eight times their number, so that those that come twice are learned as pieces.
    """
    groups = probes_of(records)
    probes = [probe for group in groups.values() for probe in group.values()]
    facts = [[fill(probe.prompt, probe.subject, probe.answer) for probe in group.values()]
             for group in groups.values()]
    table = read_table()
    rng = random.Random(0)
    docs = {"task": solved(table, int(8000 * scale), rng),
            "talk": talk(table, int(4000 * scale), rng)}
    words = Counter()
    for line in [line for lines in facts for line in lines]:
        words.update({word: 8 * count for word, count in Counter(pieces(line.text)).items()})
    words.update({word: 50 for _, _, answer in groups for word in pieces(answer)})
    sample = [line.text for line in [*docs["task"][:500], *docs["talk"][:500]]]
    words.update({word: 50 for text in sample for word in pieces(text)})
    return Source(facts, docs, words, {"seen": probes}, items.held_out_items(table),
                  items.topics(table), running_text(facts, 1500, rng), [])
