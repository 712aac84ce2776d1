"""Edit facts in language models and measure what the edits do: facts in, weight deltas and tidy rows out.

Shape letters, used in every module: B batch, T tokens, L layers, d residual width, m MLP width, V vocabulary, n facts.
"""
__version__ = "0.1.0"
