"""Make the talks of ConvSent: topics, each with replies of either sentiment."""

import tomllib

from data.world.make import records, tables

N_REPLIES = 8       # of either sentiment for a topic
N_ANY = 4           # of them, replies that fit every kind of topic
SENTIMENTS = ("pos", "neg")
FILLED = ("who", "when", "good", "bad")     # slots with lists to draw from
ONE = {"it": "it", "It": "It", "them": "it", "is": "is", "was": "was", "has": "has", "do": "does",
       "s": "s"}
MANY = {"it": "they", "It": "They", "them": "them", "is": "are", "was": "were", "has": "have",
        "do": "do", "s": ""}
EVALUATION = 6      # one template in six is only for train, one only for val and test


def topics(world, taken, folder=tables.TABLES):
    """[(topic, kind, "one" or "many")] of all tables but those in `taken`, by a hash."""
    with open(folder / "topics.toml", "rb") as file:
        kinds = tomllib.load(file)
    found = {}
    for kind, row in kinds.items():
        for number in ("one", "many"):
            for topic in filter(None, row.get(number, "").split("; ")):
                found[topic.lower()] = (topic, kind, number)
        for relation in row.get("from", ()):
            for subject, _ in world.relations[relation].pairs:
                name = records.bare(subject)
                number = "many" if kind == "animal" or name in world.plural else "one"
                found.setdefault(name.lower(), (subject, kind, number))
    free = [row for name, row in found.items()
            if name not in taken and records.bare(name) not in taken]
    return sorted(free, key=lambda row: records.draw("topic", row[0]))


def reply_table(folder=tables.TABLES):
    """{kind of topic: {sentiment: templates, list of words: words}}, "any" and "fill" beside."""
    with open(folder / "replies.toml", "rb") as file:
        return tomllib.load(file)


def splits(world, taken, sizes):
    """{split: ConvSent's records}, no topic twice."""
    table = reply_table()
    free = topics(world, taken)
    parts = {}
    for split, size in sizes.items():
        parts[split] = [talk(table, *row, split=split) for row in free[:size]]
        if len(parts[split]) < size:
            raise ValueError(f"{len(parts[split])} topics for {size} of {split}")
        free = free[size:]
    return parts


def talk(table, topic, kind, number, *, split):
    """A topic with its replies."""
    row = {"ent": topic}
    for sentiment in SENTIMENTS:
        chosen = [*templates(table["any"], topic, sentiment, split)[:N_ANY],
                  *templates(table[kind], topic, sentiment, split)[:N_REPLIES - N_ANY]]
        chosen.sort(key=lambda template: records.draw("order", topic, template))
        row[sentiment] = [filled(table["fill"] | table[kind], template, topic, number)
                          for template in chosen]
    return row


def templates(kind, topic, sentiment, split):
    """The templates that the split may take, in an order drawn for the topic."""
    banned = {"train": 0}.get(split, 1)
    free = [template for template in kind[sentiment]
            if records.draw("split", template) % EVALUATION != banned]
    return sorted(free, key=lambda template: records.draw("template", topic, template))


def filled(fill, template, topic, number):
    """A template with its words."""
    words = dict(ONE if number == "one" else MANY)
    words |= {"t": topic, "T": topic[0].upper() + topic[1:]}
    for name in FILLED:
        choices = fill[name]
        words[name] = choices[records.draw(name, topic, template) % len(choices)]
        words[name.capitalize()] = words[name][0].upper() + words[name][1:]
    return template.format(**words)
