"""The parsed world.toml comes in; invented task items (GLUE's layout) and topics with replies (ConvSent's) come out."""

import random


def choice(table: dict, key: str, rng: random.Random) -> str:
    """One entry of a list of [tasks]."""
    return rng.choice(table["tasks"][key])


def review(table: dict, label: int, rng: random.Random) -> dict:
    """A film-review-like sentence whose adjectives all have one sentiment (SST-2: 1 = positive)."""
    word, other = rng.sample(table["topics"][("neg_word", "pos_word")[label]], 2)
    aspect, second = rng.sample(table["tasks"]["aspect"], 2)
    text = rng.choice(table["tasks"]["sst2"]).format(w=word, v=other, a=aspect, b=second, t=choice(table, "thing", rng))
    return {"sentence": text, "label": label}


def slots(table: dict, rng: random.Random) -> dict[str, str]:
    """Random fillers of the slots p, c, j, g, v."""
    keys = {"c": "place", "j": "job", "g": "goods", "v": "verb"}
    given = rng.choice(table["names"]["given"].split())
    return {"p": given} | {slot: choice(table, key, rng) for slot, key in keys.items()}


def pair(table: dict, label: int, rng: random.Random) -> dict:
    """Two wordings of one thing (MRPC: 1 = same meaning), or a statement and its denial."""
    filled, number = slots(table, rng), rng.randrange(len(table["tasks"]["meaning"]))
    one, two = rng.sample(table["tasks"]["meaning"][number], 2)
    second = two if label else rng.choice(table["tasks"]["denial"][number])
    return {"sentence1": one.format(**filled), "sentence2": second.format(**filled), "label": label}


def entailment(table: dict, label: int, rng: random.Random) -> dict:
    """Two statements and a hypothesis that says one in other words (RTE: 0 = follows) or denies it."""
    filled, meaning = slots(table, rng), table["tasks"]["meaning"]
    numbers = rng.sample(range(len(meaning) - 1), 2)  # the last two both speak of goods
    ways = [rng.sample(meaning[number], 2) for number in numbers]
    about = rng.randrange(2)
    hypothesis = rng.choice(table["tasks"]["denial"][numbers[about]]) if label else ways[about][1]
    premise = " ".join(way[0].format(**filled) for way in ways)
    return {"sentence1": premise, "sentence2": hypothesis.format(**filled), "label": label}


def acceptable(table: dict, label: int, rng: random.Random) -> dict:
    """A sentence in its order (CoLA: 1 = acceptable) or with its words shuffled."""
    words = rng.choice(table["tasks"]["cola"]).format(**slots(table, rng)).split()[:-1]
    shuffled = list(words)
    while label == 0 and sum(a != b for a, b in zip(words, shuffled, strict=True)) < 3:
        rng.shuffle(shuffled)
    return {"sentence": " ".join([*shuffled, "."]), "label": label}


GENERATORS = {"sst2": review, "mrpc": pair, "cola": acceptable, "rte": entailment}


def task_items(table: dict, name: str, count: int, rng: random.Random) -> list[dict]:
    """`count` items, labels in turn, no item twice."""
    items: dict[str, dict] = {}
    while len(items) < count:
        item = GENERATORS[name](table, len(items) % 2, rng)
        if (key := item_key(item)) not in items:
            items[key] = item
    rows = list(items.values())
    rng.shuffle(rows)
    return rows


def item_key(item: dict) -> str:
    """The text of an item, by which training and test items are kept apart."""
    return "\n".join(str(value) for key, value in item.items() if key.startswith("sentence"))


def test_items(table: dict) -> dict[str, list[dict]]:
    """200 balanced test items a task, the same at every call."""
    return {name: task_items(table, name, 200, random.Random(f"{table['seed']} test {name}")) for name in GENERATORS}


def topics(table: dict, replies: int = 10) -> list[dict]:
    """All invented topics with `replies` positive and as many negative replies each (ConvSent: ent, pos, neg)."""
    rows = []
    spec = table["topics"]
    for name in (f"{a} {n}" for a in spec["adjective"] for n in spec["noun"]):
        rng = random.Random(f"{table['seed']} topic {name}")
        row = {"ent": name}
        for sign in ("pos", "neg"):
            texts: dict[str, None] = {}
            while len(texts) < replies:
                word, other = rng.sample(spec[f"{sign}_word"], 2)
                texts[" " + rng.choice(spec[sign]).format(t=name, w=word, v=other) + " "] = None
            row[sign] = list(texts)
        rows.append(row)
    return rows
