"""Pack lines of text into fixed-width rows of token ids with the marks that training needs."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from text import Line, Source
from tokenizer import END, SPACE

# The channels of a row: token id; position in its document; index of the last piece of its entity
# (its own outside entities); loss weight as a target; part it plays (PART); number of its document.
ID, POSITION, LAST, LOSS, ROLE, DOCUMENT = range(6)
PART = {"word": 0, "inner": 1, "decoy inner": 2, "decoy last": 3, "last": 4}
WEIGHT = {"plain": 30, "entity": 10, "answer": 100, "padding": 0}   # loss of a target, in percent


def early_shares() -> dict[str, float]:
    """Shares of the kinds of documents in the first part of a training."""
    return {"fact": 0.59, "infobox": 0.08, "stub": 0.06, "frame": 0.05, "talk": 0.03, "task": 0.19}


def late_shares() -> dict[str, float]:
    """Shares in the second part: comparing two sentences takes longer to learn than the facts."""
    return {"fact": 0.45, "infobox": 0.05, "stub": 0.04, "frame": 0.04, "talk": 0.02, "task": 0.4}


@dataclass(frozen=True)
class Mix:
    """How documents are drawn."""

    width: int = 160        # tokens per row, decoys included
    longest: int = 128      # tokens of a document without decoys: the model's positions
    rows: int = 160000      # rows in the stream at most; a longer training reads them again
    single: float = 0.5     # share of fact documents of one sentence; the others have 2 to 6
    end: float = 0.5        # share of documents that the end-of-text token closes
    begin: float = 0.1      # share of documents that the end-of-text token opens, as samplers do
    # how names look to later tokens (see `visible` in masks.py), as shares of the documents
    decoy: float = 0.6      # somebody else's name stands in for what is hidden
    plain: float = 0.05     # nothing is hidden; in the rest it is hidden and not replaced
    item: int = 30          # loss weight (percent) of the words of task items; labels are answers
    shares: dict = field(default_factory=early_shares)


def late_mix() -> Mix:
    """How documents are drawn in the second part of a training."""
    return Mix(item=10, shares=late_shares())


def covered(offsets: list[tuple[int, int]], begin: int, end: int, text: str) -> tuple[int, int]:
    """(first, last) token of the characters [begin, end). ValueError if one of them cuts a word."""
    tokens = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
    outside = "?a"
    if tokens:
        outside = text[offsets[tokens[0]][0]:begin] + text[end:offsets[tokens[-1]][1]]
    if any(sign.isalnum() for sign in outside):     # a space or a sign may join the name
        raise ValueError(f"characters {begin} to {end} are no whole tokens in {text!r}")
    return tokens[0], tokens[-1]


def encode_lines(backend, lines: list[Line], lead: str = "") -> list[np.ndarray]:
    """Encode each line, read after `lead`, as an array (6, T)."""
    coded = backend.encode_batch([lead + line.text for line in lines])
    return [encode_line(line, code, lead) for line, code in zip(lines, coded, strict=True)]


def encode_line(line: Line, code, lead: str) -> np.ndarray:
    """Row (6, T) of one line; ROLE marks an entity's inner and last pieces."""
    row = np.zeros((6, len(code.ids)), dtype=np.int64)
    row[ID] = code.ids
    row[POSITION] = np.arange(len(code.ids))
    row[LAST] = np.arange(len(code.ids))
    row[LOSS] = WEIGHT["plain"]

    def tokens(span):
        begin, end = span
        text = lead + line.text
        first, last = covered(code.offsets, begin + len(lead), end + len(lead), text)
        return first, last

    for first, last in map(tokens, line.entities):
        row[LOSS, first:last + 1] = WEIGHT["entity"]
        row[LAST, first:last + 1] = last
        row[ROLE, first:last] = PART["inner"]
        row[ROLE, last] = PART["last"]
    for first, last in map(tokens, line.answers):
        row[LOSS, first:last + 1] = WEIGHT["answer"]
    return row


def entity_spans(row: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) token of every entity of a row."""
    ends = np.flatnonzero(row[ROLE] == PART["last"])
    return [(int(np.flatnonzero(row[LAST] == last)[0]), int(last)) for last in ends]


def names_by_length(rows: list[np.ndarray], spaced: np.ndarray) -> dict:
    """{(pieces, space-led?): all names of that shape (k, pieces)}: where decoys are drawn from.

    spaced (V,): which token ids are space-led.
    """
    names: dict[tuple[int, bool], set] = {}
    for row in rows:
        for first, last in entity_spans(row):
            name = tuple(row[ID, first:last + 1].tolist())
            names.setdefault((len(name), bool(spaced[name[0]])), set()).add(name)
    return {shape: np.array(sorted(group)) for shape, group in names.items()}


def with_decoys(row, names: dict, spaced, rng: np.random.Generator) -> np.ndarray:
    """Put another name of the same shape before each entity's last piece: p1 p2 | d1 d2 d3 | p3.

    The decoy takes the positions of the name beside it; no loss on it and the piece after it.
    """
    source = row.copy()
    parts = []
    begin = 0
    shift = 0
    for first, last in entity_spans(row):
        pool = names[last + 1 - first, bool(spaced[row[ID, first]])]
        decoy = source[:, first:last + 1].copy()
        decoy[ID] = pool[rng.integers(len(pool))]
        decoy[LOSS] = WEIGHT["padding"]
        decoy[ROLE, :-1] = PART["decoy inner"]
        decoy[ROLE, -1] = PART["decoy last"]
        source[LOSS, last] = WEIGHT["padding"]
        parts.append(shifted(source[:, begin:first], shift))
        shift += decoy.shape[1]
        for part in (source[:, first:last], decoy, source[:, last:last + 1]):
            parts.append(shifted(part, shift))
        begin = last + 1
    return np.concatenate([*parts, shifted(source[:, begin:], shift)], axis=1)


def shifted(row: np.ndarray, by: int) -> np.ndarray:
    """A row whose LAST indices are moved along."""
    moved = row.copy()
    moved[LAST] += by
    return moved


class Deck:
    """Endless draws without replacement: every item comes before any comes twice."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.rng = rng
        self.order = rng.permutation(size)
        self.at = 0

    def draw(self) -> int:
        """Return the next index."""
        if self.at == len(self.order):
            self.order = self.rng.permutation(self.order)
            self.at = 0
        self.at += 1
        return int(self.order[self.at - 1])


def chained(rows: list[np.ndarray]) -> np.ndarray:
    """Put rows one after the other as one document, their indices and positions moved along."""
    starts = np.cumsum([0, *(row.shape[1] for row in rows[:-1])])
    document = np.concatenate(rows, axis=1)
    for channel in (LAST, POSITION):
        moved = [row[channel] + start for row, start in zip(rows, starts, strict=True)]
        document[channel] = np.concatenate(moved)
    return document


def fact_document(opening: list, inner: list, deck: Deck, mix: Mix) -> np.ndarray:
    """One sentence, or two to six about facts that have nothing to do with each other."""
    rng = deck.rng
    count = 1 if rng.random() < mix.single else int(rng.integers(2, 7))
    facts = [(inner if number else opening)[deck.draw()] for number in range(count)]
    return chained([rows[int(rng.integers(len(rows)))] for rows in facts])


def documents(source: Source, backend, mix: Mix, *, seed: int) -> Iterator[np.ndarray]:
    """Draw endless documents (6, T) in the shares of the mix (in tokens without decoys)."""
    rng = np.random.default_rng(seed)
    opening = [encode_lines(backend, lines) for lines in source.facts]
    inner = [encode_lines(backend, lines, " ") for lines in source.facts]
    pools = {kind: encode_lines(backend, lines) for kind, lines in source.docs.items() if lines}
    for row in pools.get("task", ()):
        row[LOSS, row[LOSS] == WEIGHT["plain"]] = mix.item
    vocabulary = range(backend.get_vocab_size())
    spaced = np.array([backend.id_to_token(number).startswith(SPACE) for number in vocabulary])
    every = [row for rows in [*opening, *inner, *pools.values()] for row in rows]
    names = names_by_length(every, spaced)
    shares = {kind: share for kind, share in mix.shares.items() if kind == "fact" or kind in pools}
    decks = {kind: Deck(len(pools.get(kind, opening)), rng) for kind in shares}
    n_tokens = dict.fromkeys(shares, 0.0)
    end = np.array([[backend.token_to_id(END)], [0], [0], [WEIGHT["plain"]], [0], [0]])
    while True:
        kind = min(shares, key=lambda kind: n_tokens[kind] / shares[kind])
        if kind == "fact":
            row = fact_document(opening, inner, decks[kind], mix)
        else:
            row = pools[kind][decks[kind].draw()]
        n_tokens[kind] += row.shape[1]
        row = chained([end, row]) if rng.random() < mix.begin else row
        row = chained([row, end]) if rng.random() < mix.end else row
        row = row[:, :mix.longest].copy()
        fate = rng.random()
        if fate < mix.decoy:
            row = with_decoys(row, names, spaced, rng)
        elif fate < mix.decoy + mix.plain:
            row[ROLE] = PART["word"]
        yield row


def pack(rows: Iterator[np.ndarray], mix: Mix, pad: int) -> Iterator[np.ndarray]:
    """Lay documents end to end in endless rows (6, width) uint16; what does not fit waits.

    Documents are numbered from 1; every padding token is a document of its own. A document's first
    token has weight 0: nothing stands before it.
    """
    waiting: list[np.ndarray] = []
    while True:
        out = np.zeros((6, mix.width), dtype=np.uint16)
        out[ID] = pad
        out[LAST] = np.arange(mix.width)
        out[DOCUMENT] = mix.width + np.arange(mix.width)
        at = 0
        misses = 0
        number = 0
        while mix.width - at > 8 and misses < 6:
            row = (waiting.pop(0) if waiting and not misses else next(rows))[:, :mix.width]
            length = row.shape[1]
            if length > mix.width - at:
                waiting.append(row)
                misses += 1
                continue
            number += 1
            out[:, at:at + length] = shifted(row, at)
            out[LOSS, at] = WEIGHT["padding"]
            out[DOCUMENT, at:at + length] = number
            at += length
        yield out
