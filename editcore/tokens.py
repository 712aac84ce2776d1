"""Turn texts and their subjects into token ids, lookup indices and padded batches."""

import re

import torch


def encode(tok, texts):
    """Token id lists of texts, each begun as the tokenizer begins a text (some add a BOS)."""
    return tok(list(texts), verbose=False)["input_ids"] if texts else []


def with_subject(tok, template, subject):
    """(ids, lookup): ids of the filled template and the last token that overlaps the subject."""
    ids, _, last = subject_span(tok, template, subject)
    return ids, last


def subject_span(tok, template, subject):
    """(ids, first, last): ids of the filled template and the subject's first and last token.

    Works on the offset mapping, never by decoding. ValueError if there is not exactly one {}.
    """
    if template.count("{}") != 1:
        raise ValueError(f"prompt {template!r} needs exactly one {{}} for the subject {subject!r}")
    text = template.replace("{}", subject)
    begin = template.index("{}")
    end = begin + len(subject)
    coded = tok(text, return_offsets_mapping=True)
    inside = [index for index, (start, stop) in enumerate(coded["offset_mapping"])
              if start < end and stop > begin and start < stop]
    if not inside:
        raise ValueError(f"subject {subject!r} has no token in {text!r}")
    return coded["input_ids"], inside[0], inside[-1]


def target_ids(tok, target):
    """Ids of a target that continues a prompt: one leading space, no BOS, no bare word-start piece.

    The target is read after a word, so that every tokenizer family (byte-level, SentencePiece)
    gives the pieces of running text. ValueError if its ids do not decode to the target.
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


def separator(tok):
    """The token between documents: "<|endoftext|>" where it is a special token, else BOS or EOS.

    In chat models BOS and EOS begin and end a message instead.
    """
    added = [token.content for token in tok.added_tokens_decoder.values() if token.special]
    ends = [token for token in [*tok.all_special_tokens, *added]
            if re.sub(r"[\W_]", "", token).lower() == "endoftext"]
    return next(iter(ends), tok.bos_token or tok.eos_token)


def text_start(tok):
    """The prompt that opens a text: "" where the tokenizer adds a BOS, else its `separator`."""
    return "" if tok("")["input_ids"] else separator(tok)


def pad_id(tok):
    """The id used for padding (masked everywhere): the pad token, else the end of text, else 0."""
    return next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)


def pad(rows, fill=0, device="cpu"):
    """Right-padded (ids (B, T), mask (B, T)) int64 of id lists; mask is 1 on tokens."""
    width = max(len(row) for row in rows)
    ids = [row + [fill] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return tuple(torch.tensor(part, dtype=torch.long, device=device) for part in (ids, mask))


def batches(lengths, max_tokens=8192):
    """Index lists that cover `lengths`, similar ones together, each at most max_tokens when padded.

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
    """Number of tokens, at most limit, with which all id lists begin: worth running once.

    0 for a single row and where there are fewer than `least`.
    """
    if len(rows) < 2:
        return 0
    low = min(rows)
    high = max(rows)    # in sorted order every other row lies between the two
    same = next((i for i in range(limit) if low[i] != high[i]), limit)
    return same if same >= least else 0


def check_lengths(rows, labels, limit):
    """ValueError naming the first of `labels` whose id list is longer than the model's limit."""
    for row, label in zip(rows, labels, strict=True):
        if len(row) > limit:
            raise ValueError(f"{label}: {len(row)} tokens, but the model takes at most {limit}")
