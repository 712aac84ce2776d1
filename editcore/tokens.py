"""Turn texts and their subjects into token ids, lookup indices and padded batches."""

import re
import unicodedata

import torch

from editcore.facts import UNSPACED, same

ROOM = 8192     # most tokens of a padded batch


def encode(tok, texts):
    """Return texts' id lists, begun as the tokenizer begins a text; what it puts behind is cut."""
    if not texts:
        return []
    end = appended(tok)
    rows = tok(list(texts), verbose=False)["input_ids"]
    return [row[:-end] for row in rows] if end else rows


def appended(tok):
    """Return how many special tokens the tokenizer puts behind every text."""
    mask = tok("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return mask[::-1].index(0) if 0 in mask else 0


def encode_pairs(tok, pairs, labels=None):
    """Return [(prompt ids, answer ids)] of (prompt, answer) texts: the ids of the joined text, cut.

    A blank joins them (see `gap`). Where a token would hold the prompt's end and the answer's
    beginning, both are tokenised alone. ValueError names an answer that holds a control token or
    that the tokenizer cannot write, and the pair's label (such as "record 3").
    """
    pairs = [(prompt, answer.strip()) for prompt, answer in pairs]
    labels = [f"{label}: " for label in labels] if labels else [""] * len(pairs)
    controls = control_tokens(tok)
    tails = [gap(prompt, answer, controls) + answer for prompt, answer in pairs]
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    prompt_ids = dict(zip(prompts, encode(tok, prompts)))
    rows = encode(tok, [prompt + tail for (prompt, _), tail in zip(pairs, tails)])
    coded = []
    for (prompt, answer), tail, row, label in zip(pairs, tails, rows, labels, strict=True):
        label = f"{label}target {answer!r:.80}"
        refuse_controls(answer, controls, label)
        ids = prompt_ids[prompt]
        if row[:len(ids)] != ids or len(row) == len(ids):
            ids, row = _cut(tok, prompt, tail, ids=ids, label=label)
        coded.append((ids, row[len(ids):]))
        written = tok.decode(coded[-1][1], clean_up_tokenization_spaces=False).strip()
        if not same(written, answer):
            raise ValueError(f"{label}: decoding its tokens gives {written!r:.80}")
    return coded


def answer_ids(tok, prompt, answer):
    """Return the ids of an answer behind a prompt: see `encode_pairs`."""
    return encode_pairs(tok, [(prompt, answer)])[0][1]


def target_ids(tok, target):
    """Return the ids of a target by itself: those it has behind a word."""
    return answer_ids(tok, "a", target)


def gap(prompt, answer, controls=()):
    """Return what stands between a prompt and its answer: a blank, or nothing.

    Nothing behind a line break, a control token or an opening bracket, and nothing where either
    side is of a script that is written without blanks (Chinese, Japanese, Thai, …).
    """
    last = prompt[-1:]
    joined = (not last or last.isspace() or unicodedata.category(last) in ("Ps", "Pi")
              or prompt.endswith(tuple(controls)))
    return "" if joined or re.search(f"[{UNSPACED}]", last + answer[:1]) else " "


def control_tokens(tok):
    """Return the tokenizer's control tokens: all that are special, or look like a tag."""
    added = tok.backend_tokenizer.get_added_tokens_decoder().values()
    tags = [token.content for token in added
            if token.special or re.fullmatch(r"<.+>|\[.+\]", token.content)]
    return tuple(dict.fromkeys([*tok.all_special_tokens, *tags]))


def refuse_controls(text, controls, label):
    """ValueError if a subject or answer holds one of the tokenizer's control tokens."""
    for token in controls:
        if token in text:
            raise ValueError(f"{label} holds the tokenizer's control token {token!r}")


def with_subject(tok, template, subject):
    """Return (ids of the filled template, last token that overlaps the subject)."""
    ids, _, last = subject_span(tok, template, subject)
    return ids, last


def subject_span(tok, template, subject):
    """Return (ids of the filled template, first and last token of the subject in it)."""
    if template.count("{}") != 1:
        raise ValueError(f"prompt {template!r} needs exactly one {{}} for the subject {subject!r}")
    text = template.replace("{}", subject)
    begin = template.index("{}")
    end = begin + len(subject)
    refuse_controls(subject, control_tokens(tok), f"subject {subject!r}")
    coded = tok(text, return_offsets_mapping=True)
    inside = [index for index, (start, stop) in enumerate(coded["offset_mapping"])
              if start < end and stop > begin and start < stop]
    if not inside:
        raise ValueError(f"subject {subject!r} has no token in {text!r}")
    ids = coded["input_ids"]
    return ids[:len(ids) - appended(tok)], inside[0], inside[-1]


def separator(tok):
    """Return the token between documents: a special "<|endoftext|>", else BOS or EOS."""
    added = [token.content for token in tok.added_tokens_decoder.values() if token.special]
    ends = [token for token in [*tok.all_special_tokens, *added]
            if re.sub(r"[\W_]", "", token).lower() == "endoftext"]
    return next(iter(ends), tok.bos_token or tok.eos_token)


def text_start(tok):
    """Return the prompt that opens a text: "" where the tokenizer adds a BOS, else `separator`."""
    return "" if any(encode(tok, [""])) else separator(tok)


def pad_id(tok):
    """Return the id used for padding: the pad token, else the end of text, else 0."""
    return next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)


def pad(rows, fill=0, device="cpu"):
    """Return right-padded (ids (B, T), mask (B, T)) int64 of id lists; mask is 1 on tokens."""
    width = max(len(row) for row in rows)
    ids = [row + [fill] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return tuple(torch.tensor(part, dtype=torch.long, device=device) for part in (ids, mask))


def batches(lengths, max_tokens=ROOM):
    """Yield index lists of similar lengths, each of at most max_tokens when padded, or one row."""
    current = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[index] > max_tokens:
            yield current
            current = []
        current.append(index)
    if current:
        yield current


def common(rows, limit, least=16):
    """Return how many tokens, up to limit, all of several id lists begin with; 0 below `least`."""
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


def _cut(tok, prompt, tail, *, ids, label):
    """(prompt ids, ids of both) where the joined text does not begin with the prompt's `ids`."""
    coded = tok(prompt + tail, return_offsets_mapping=True)
    joined = coded["input_ids"][:len(coded["input_ids"]) - appended(tok)]
    spans = coded["offset_mapping"][:len(joined)]
    behind = [i for i, (start, stop) in enumerate(spans) if start < stop and stop > len(prompt)]
    if behind and not prompt[spans[behind[0]][0]:].strip(" "):
        return joined[:behind[0]], joined
    word = "a" if tail[:1] == " " else "\n"
    lead, both = encode(tok, [word, word + tail])
    if both[:len(lead)] != lead or len(both) == len(lead):
        raise ValueError(f"{label}: the tokenizer merges it with the word before")
    return ids, ids + both[len(lead):]
