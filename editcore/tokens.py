"""Texts and their subjects in; token ids, lookup indices and padded, length-bucketed batches out."""

import torch


def encode(tok, texts):
    """Token id lists of texts, as the tokenizer begins a text (with a BOS only where the family has one)."""
    return tok(list(texts), verbose=False)["input_ids"] if texts else []


def with_subject(tok, template, subject):
    """(ids, lookup): ids of template with {} filled, and the last token that overlaps the subject's characters.

    Works on the offset mapping, never by decoding. Raises ValueError if the template has not exactly one {}.
    """
    if template.count("{}") != 1:
        raise ValueError(f"prompt {template!r} needs exactly one {{}} for the subject {subject!r}")
    begin = template.index("{}")
    return encode_span(tok, template.replace("{}", subject), begin, begin + len(subject))


def encode_span(tok, text, begin, end):
    """(ids, index of the last token that overlaps characters [begin, end)) of a text."""
    coded = tok(text, return_offsets_mapping=True)
    hits = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < end and b > begin and a < b]
    if not hits:
        raise ValueError(f"subject {text[begin:end]!r} has no token in {text!r}")
    return coded["input_ids"], hits[-1]


def subject_span(tok, template, subject):
    """(first, last) token index of the subject in the filled template."""
    ids, last = with_subject(tok, template, subject)
    coded, begin = tok(template.replace("{}", subject), return_offsets_mapping=True), template.index("{}")
    first = next(i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < b and b > begin)
    return first, last


def target_ids(tok, target):
    """Ids of a target that continues a prompt: one leading space, no BOS, no bare word-start piece.

    The target is read after a word, so that every tokenizer family (byte-level, SentencePiece) gives the pieces it
    gives in running text. ValueError if ids -> text does not give the target back.
    """
    text = " " + target.strip()
    lead = tok("a")["input_ids"]
    ids = tok("a" + text)["input_ids"]
    if ids[:len(lead)] != lead or len(ids) == len(lead):
        raise ValueError(f"target {target!r}: the tokenizer merges it with the word before")
    ids = ids[len(lead):]
    if tok.decode(ids).strip() != text.strip():
        raise ValueError(f"target {target!r}: decoding its tokens gives {tok.decode(ids)!r}")
    return ids


def pad_id(tok):
    """The id used for padding (masked everywhere): the pad token, else the end of text, else 0."""
    return next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)


def pad(rows, fill=0, device="cpu"):
    """Right-padded (ids (B, T), mask (B, T)) int64 of id lists; mask is 1 on tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids.to(device), mask.to(device)


def batches(lengths, max_tokens=8192):
    """Index lists that cover range(len(lengths)), similar lengths together, each at most max_tokens when padded.

    A single row longer than max_tokens is a batch of its own. Deterministic.
    """
    current = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[index] > max_tokens:
            yield current
            current = []
        current.append(index)
    if current:
        yield current


def common(rows, limit, least=16):
    """Number of tokens, at most limit, that all id lists begin with: worth running once if there are several rows.

    0 for a single row and where there are fewer than `least`.
    """
    if len(rows) < 2:
        return 0
    low, high = min(rows), max(rows)    # in sorted order every other row lies between them
    same = next((i for i in range(limit) if low[i] != high[i]), limit)
    return same if same >= least else 0


def check_lengths(rows, labels, limit):
    """ValueError naming the first of `labels` whose id list is longer than the model's limit."""
    for row, label in zip(rows, labels, strict=True):
        if len(row) > limit:
            raise ValueError(f"{label}: {len(row)} tokens, but the model takes at most {limit}")
