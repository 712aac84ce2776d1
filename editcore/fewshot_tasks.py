"""An item in GLUE's layout and some solved ones come in; a few-shot prompt that ends before the label comes out."""

from dataclasses import dataclass

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class FewShot:
    """One task. `template` holds GLUE's field names in braces; the label word follows its end after a space."""

    template: str
    labels: tuple[str, ...]  # label words by GLUE's label number, without the leading space; each is one token
    chance: float = 0.5  # accuracy of a constant answer on balanced items


TASKS = {
    "sst2": FewShot("Review: {sentence}\nSentiment:", ("negative", "positive")),
    "mrpc": FewShot("Sentence 1: {sentence1}\nSentence 2: {sentence2}\nSame meaning:", ("no", "yes")),
    "cola": FewShot("Sentence: {sentence}\nGrammatical:", ("no", "yes")),
    # GLUE's RTE: 0 = entailment, 1 = not. The words keep that (a published prompt has them the wrong way round).
    "rte": FewShot("{sentence1}\nQuestion: {sentence2} True or false?\nAnswer:", ("true", "false")),
}


def task(name: str) -> FewShot:
    """The task of that name. Raises ValueError with the known names."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def question(name: str, item: dict) -> str:
    """One item without its answer. Raises ValueError naming the missing field."""
    try:
        return task(name).template.format(**{key: str(value).strip() for key, value in item.items()})
    except KeyError as error:
        raise ValueError(f"{name} item has no field {error}: found {', '.join(sorted(item))}") from None


def answer(name: str, item: dict) -> str:
    """The label word of an item, with its leading space. Raises ValueError on a label that the task does not have."""
    labels = task(name).labels
    if item.get("label") not in range(len(labels)):
        raise ValueError(f"{name} item has label {item.get('label')!r}: expected one of {list(range(len(labels)))}")
    return f" {labels[item['label']]}"


def render(name: str, item: dict, shots: list[dict]) -> str:
    """The prompt of an item: the solved `shots`, then the item up to where its label word belongs (after a space)."""
    solved = [question(name, shot) + answer(name, shot) for shot in shots]
    return SEPARATOR.join([*solved, question(name, item)])
