"""A source of lines and a tokenizer come in; fixed-width rows of token ids with their six marks come out."""

from dataclasses import dataclass

import numpy as np

from editcore.corpus import Line, Source
from editcore.wordpieces import END, SPACE

# The channels of a row: token id; position within its document; index of the last piece of its entity (its own outside
# entities); loss weight as a target; part it plays (PART); number of its document in the row.
ID, POSITION, LAST, LOSS, ROLE, DOCUMENT = range(6)
PART = {"word": 0, "inner": 1, "decoy inner": 2, "decoy last": 3, "last": 4}
WEIGHT = {"plain": 30, "entity": 10, "answer": 100, "padding": 0}  # loss weight of a token as a target, in percent


@dataclass(frozen=True)
class Mix:
    """How documents are drawn."""

    width: int = 160  # tokens a row, decoys included
    longest: int = 128  # tokens of a document, decoys not counted: the model's positions
    rows: int = 160000  # rows in the stream at most; a longer training reads them again in another order
    single: float = 0.5  # share of fact documents of one sentence; the others have 2 to 6
    end: float = 0.5  # share of documents that are closed by the end-of-text token
    # How names look to later tokens (see learning.visible), as shares of the documents. The rest: hidden, not replaced.
    decoy: float = 0.6  # somebody else's name stands in for what is hidden
    plain: float = 0.05  # nothing is hidden
    item: int = 30  # loss weight (percent) of the words of task items, which are drawn at random; labels are answers
    begin: float = 0.1  # share of documents that the end-of-text token opens, as samplers do
    shares: tuple = (("fact", 0.59), ("infobox", 0.08), ("stub", 0.06), ("frame", 0.05), ("talk", 0.03), ("task", 0.19))


# The second part of a training: the facts are known by then, comparing two sentences takes longer to learn.
LATE = Mix(item=10, shares=(("fact", 0.45), ("infobox", 0.05), ("stub", 0.04), ("frame", 0.04), ("talk", 0.02),
                            ("task", 0.4)))


def covered(offsets: list[tuple[int, int]], a: int, b: int, text: str) -> tuple[int, int]:
    """(first, last) token of the characters [a, b). ValueError if one cuts a word (a space or a sign may join it)."""
    hit = [i for i, (x, y) in enumerate(offsets) if x < b and y > a]
    outside = text[offsets[hit[0]][0]:a] + text[b:offsets[hit[-1]][1]] if hit else "?a"
    if any(sign.isalnum() for sign in outside):
        raise ValueError(f"characters {a} to {b} are no whole tokens in {text!r}")
    return hit[0], hit[-1]


def encode_lines(backend, lines: list[Line], lead: str = "") -> list[np.ndarray]:
    """An array (6, T) a line, read after `lead`; ROLE tells an entity's inner and last pieces.

    Raises ValueError if an entity's border cuts a token.
    """
    rows = []
    for line, coded in zip(lines, backend.encode_batch([lead + line.text for line in lines]), strict=True):
        row = np.zeros((6, len(coded.ids)), dtype=np.int64)
        row[ID], row[POSITION], row[LAST] = coded.ids, np.arange(len(coded.ids)), np.arange(len(coded.ids))
        row[LOSS] = WEIGHT["plain"]
        for spans, name in ((line.entities, "entity"), (line.answers, "answer")):
            for a, b in spans:
                first, last = covered(coded.offsets, a + len(lead), b + len(lead), lead + line.text)
                row[LOSS, first:last + 1] = WEIGHT[name]
                if name == "entity":
                    row[LAST, first:last + 1], row[ROLE, first:last] = last, PART["inner"]
                    row[ROLE, last] = PART["last"]
        rows.append(row)
    return rows


def names_by_length(rows: list[np.ndarray], spaced: np.ndarray) -> dict[tuple[int, bool], np.ndarray]:
    """(pieces, space-led?) → all names of that shape (k, pieces), to draw decoys from. spaced (V,): which ids are."""
    found: dict[tuple[int, bool], set] = {}
    for row in rows:
        for last in np.flatnonzero(row[ROLE] == PART["last"]):
            first = int(np.flatnonzero(row[LAST] == last)[0])
            name = tuple(row[ID, first:last + 1].tolist())
            found.setdefault((len(name), bool(spaced[name[0]])), set()).add(name)
    return {shape: np.array(sorted(names)) for shape, names in found.items()}


def with_decoys(row: np.ndarray, names: dict, spaced: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The document with another name of the same shape before the last piece of every entity: p1 p2 | d1 d2 d3 | p3.

    The decoy takes the positions of the name it stands beside; no loss on it and on the piece after it.
    """
    parts, at, moved = [], 0, 0
    out_of = row.copy()
    for last in np.flatnonzero(row[ROLE] == PART["last"]):
        first = int(np.flatnonzero(row[LAST] == last)[0])
        pool = names[last + 1 - first, bool(spaced[row[ID, first]])]
        decoy = out_of[:, first:last + 1].copy()
        decoy[ID], decoy[LOSS] = pool[rng.integers(len(pool))], WEIGHT["padding"]
        decoy[ROLE, :-1], decoy[ROLE, -1] = PART["decoy inner"], PART["decoy last"]
        out_of[LOSS, last] = WEIGHT["padding"]
        parts += [shifted(out_of[:, at:first], moved)]
        moved += decoy.shape[1]
        parts += [shifted(part, moved) for part in (out_of[:, first:last], decoy, out_of[:, last:last + 1])]
        at = last + 1
    return np.concatenate([*parts, shifted(out_of[:, at:], moved)], axis=1)


def shifted(row: np.ndarray, by: int) -> np.ndarray:
    """A row whose LAST indices are moved along."""
    out = row.copy()
    out[LAST] += by
    return out


class Deck:
    """Endless draws without replacement: every item comes once before any comes twice."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.rng, self.order, self.at = rng, rng.permutation(size), 0

    def draw(self) -> int:
        """The next index."""
        if self.at == len(self.order):
            self.order, self.at = self.rng.permutation(self.order), 0
        self.at += 1
        return int(self.order[self.at - 1])


def chained(rows: list[np.ndarray]) -> np.ndarray:
    """Rows one after the other as one document, their indices and positions moved along."""
    starts = np.cumsum([0, *(row.shape[1] for row in rows[:-1])])
    out = np.concatenate(rows, axis=1)
    for channel in (LAST, POSITION):
        out[channel] = np.concatenate([row[channel] + start for row, start in zip(rows, starts, strict=True)])
    return out


def fact_document(opening: list, inner: list, deck: Deck, mix: Mix) -> np.ndarray:
    """One sentence, or two to six about facts that have nothing to do with each other."""
    rng = deck.rng
    count = 1 if rng.random() < mix.single else int(rng.integers(2, 7))
    chosen = [(opening if not number else inner)[deck.draw()] for number in range(count)]
    return chained([rows[int(rng.integers(len(rows)))] for rows in chosen])


def documents(source: Source, backend, mix: Mix, seed: int):
    """Endless token rows (6, T), one a document, in the shares of the mix (counted in tokens without decoys)."""
    rng = np.random.default_rng(seed)
    opening = [encode_lines(backend, lines) for lines in source.facts]
    inner = [encode_lines(backend, lines, " ") for lines in source.facts]
    pools = {kind: encode_lines(backend, lines) for kind, lines in source.docs.items() if lines}
    for row in pools.get("task", ()):
        row[LOSS, row[LOSS] == WEIGHT["plain"]] = mix.item
    spaced = np.array([backend.id_to_token(number).startswith(SPACE) for number in range(backend.get_vocab_size())])
    names = names_by_length([row for rows in [*opening, *inner, *pools.values()] for row in rows], spaced)
    shares = {kind: share for kind, share in mix.shares if kind == "fact" or kind in pools}
    decks = {kind: Deck(len(pools.get(kind, opening)), rng) for kind in shares}
    given = dict.fromkeys(shares, 0.0)
    close = np.array([[backend.token_to_id(END)], [0], [0], [WEIGHT["plain"]], [0], [0]])
    while True:
        kind = min(given, key=lambda one: given[one] / shares[one])
        row = fact_document(opening, inner, decks[kind], mix) if kind == "fact" else pools[kind][decks[kind].draw()]
        given[kind] += row.shape[1]
        row = chained([close, row]) if rng.random() < mix.begin else row
        row = (chained([row, close]) if rng.random() < mix.end else row)[:, :mix.longest].copy()
        fate = rng.random()
        if fate < mix.decoy:
            row = with_decoys(row, names, spaced, rng)
        elif fate < mix.decoy + mix.plain:
            row[ROLE] = PART["word"]
        yield row


def pack(rows, mix: Mix, pad: int):
    """Endless rows (6, width) uint16 of documents laid end to end; what does not fit waits for the next row.

    Documents are numbered from 1; every padding token is a document of its own. A document's first token has weight 0:
    nothing stands before it.
    """
    waiting: list[np.ndarray] = []
    while True:
        out = np.zeros((6, mix.width), dtype=np.uint16)
        out[ID], out[LAST] = pad, np.arange(mix.width)
        out[DOCUMENT] = mix.width + np.arange(mix.width)
        at, misses, number = 0, 0, 0
        while mix.width - at > 8 and misses < 6:
            row = (waiting.pop(0) if waiting and not misses else next(rows))[:, : mix.width]
            length = row.shape[1]
            if length > mix.width - at:
                waiting.append(row)
                misses += 1
                continue
            number += 1
            out[:, at:at + length] = shifted(row, at)
            out[LOSS, at], out[DOCUMENT, at:at + length] = WEIGHT["padding"], number
            at += length
        yield out
