"""Make items of the four few-shot tasks (GLUE's layout) and topics with replies (ConvSent's)."""

import random


def fillers(table: dict, rng: random.Random) -> dict[str, str]:
    """Draw one filler for each of the slots p (person), c (city), j (job), g (goods), v (verb)."""
    person = rng.choice(table["names"]["given"].split())
    keys = {"c": "place", "j": "job", "g": "goods", "v": "verb"}
    return {"p": person} | {slot: rng.choice(table["tasks"][key]) for slot, key in keys.items()}


def sst2(table: dict, label: int, rng: random.Random) -> dict:
    """A sentence from a review whose adjectives all have one sentiment (1 = positive)."""
    word, other_word = rng.sample(table["topics"][("neg_word", "pos_word")[label]], 2)
    aspect, other_aspect = rng.sample(table["tasks"]["aspect"], 2)
    template = rng.choice(table["tasks"]["sst2"])
    thing = rng.choice(table["tasks"]["thing"])
    text = template.format(w=word, v=other_word, a=aspect, b=other_aspect, t=thing)
    return {"sentence": text, "label": label}


def mrpc(table: dict, label: int, rng: random.Random) -> dict:
    """Two wordings of one thing (1 = same meaning), or a statement and its denial."""
    slots = fillers(table, rng)
    number = rng.randrange(len(table["tasks"]["meaning"]))
    first, second = rng.sample(table["tasks"]["meaning"][number], 2)
    second = second if label else rng.choice(table["tasks"]["denial"][number])
    return {"sentence1": first.format(**slots), "sentence2": second.format(**slots), "label": label}


def rte(table: dict, label: int, rng: random.Random) -> dict:
    """Two statements and a hypothesis that says one in other words (0 = follows) or denies it."""
    slots = fillers(table, rng)
    meaning = table["tasks"]["meaning"]
    numbers = rng.sample(range(len(meaning) - 1), 2)    # the last two both speak of goods
    wordings = [rng.sample(meaning[number], 2) for number in numbers]
    about = rng.randrange(2)
    denials = table["tasks"]["denial"][numbers[about]]
    hypothesis = rng.choice(denials) if label else wordings[about][1]
    premise = " ".join(wording[0].format(**slots) for wording in wordings)
    return {"sentence1": premise, "sentence2": hypothesis.format(**slots), "label": label}


def cola(table: dict, label: int, rng: random.Random) -> dict:
    """A sentence in its order (1 = acceptable) or with at least three words out of place."""
    words = rng.choice(table["tasks"]["cola"]).format(**fillers(table, rng)).split()[:-1]
    shuffled = list(words)
    while label == 0 and sum(a != b for a, b in zip(words, shuffled, strict=True)) < 3:
        rng.shuffle(shuffled)
    return {"sentence": " ".join([*shuffled, "."]), "label": label}


GENERATORS = {"sst2": sst2, "mrpc": mrpc, "cola": cola, "rte": rte}


def item_key(item: dict) -> str:
    """The text of an item, by which training and test items are kept apart."""
    return "\n".join(str(value) for key, value in item.items() if key.startswith("sentence"))


def task_items(table: dict, task: str, count: int, rng: random.Random) -> list[dict]:
    """Draw `count` items, labels in turn, no item twice; shuffled."""
    items: dict[str, dict] = {}
    while len(items) < count:
        item = GENERATORS[task](table, len(items) % 2, rng)
        items.setdefault(item_key(item), item)
    rows = list(items.values())
    rng.shuffle(rows)
    return rows


def held_out_items(table: dict) -> dict[str, list[dict]]:
    """200 balanced test items per task, the same at every call."""
    seed = table["seed"]
    return {task: task_items(table, task, 200, random.Random(f"{seed} test {task}"))
            for task in GENERATORS}


def topics(table: dict, replies: int = 10) -> list[dict]:
    """All invented topics, each with `replies` positive and as many negative replies."""
    spec = table["topics"]
    rows = []
    for name in [f"{adjective} {noun}" for adjective in spec["adjective"] for noun in spec["noun"]]:
        rng = random.Random(f"{table['seed']} topic {name}")
        row = {"ent": name}
        for sign in ("pos", "neg"):
            texts: dict[str, None] = {}
            while len(texts) < replies:
                word, other_word = rng.sample(spec[f"{sign}_word"], 2)
                reply = rng.choice(spec[sign]).format(t=name, w=word, v=other_word)
                texts[f" {reply} "] = None
            row[sign] = list(texts)
        rows.append(row)
    return rows
