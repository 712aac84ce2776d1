"""Edit facts in language models and measure what the edits do.

    import editcore as ec

    model, tok = ec.load("pocket")
    fact = ec.Fact(prompt="The capital of {} is", subject="France", target_new="Rome")
    delta = ec.edit(model, tok, [fact], "rome")
    with delta.applied(model):
        rows = ec.measure(model, tok, [fact])

Shape letters, used in every module: B batch, T tokens, L layers, d residual width, m MLP width,
V vocabulary, n facts.
"""

import pkgutil

__version__ = "0.1.0"

# Public name -> where it is defined; imported on first use, because torch takes seconds to import.
_FACE = {
    "load": "model:load",
    "content_hash": "model:content_hash",
    "Fact": "facts:Fact",
    "read_facts": "facts:read_facts",
    "EDITORS": "editors:EDITORS",
    "configure": "editors:configure",
    "edit": "editors:edit",
    "prepare": "editors:prepare",
    "Delta": "delta:Delta",
    "Patch": "delta:Patch",
    "load_delta": "delta:load",
    "write": "generate:texts",
    "measure": "metrics:measure",
    "known": "knowledge:known",
    "Run": "study.run:Run",
    "execute": "study.loop:execute",
    "execute_all": "study.loop:execute_all",
    "runs": "study.results:runs",
    "published": "study.results:published",
    "table": "study.results:table",
    "plans": "study.plans:",
}

__all__ = [*_FACE]


def __getattr__(name):
    if name not in _FACE:
        raise AttributeError(f"module 'editcore' has no attribute {name!r}")
    return pkgutil.resolve_name(f"editcore.{_FACE[name]}")


def __dir__():
    return sorted({*globals(), *__all__})
