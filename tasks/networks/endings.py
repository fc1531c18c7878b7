"""What networks end in, for those who need not know transformers."""

OWN_HEADS = ("classification", "token_classification")
"""Endings that every task's expert has of its own: one answer for a text (a class, or a number), a class for
each token.

Trunks are merged; the experts' heads lie beside them, unless the base has the same head."""

WRITING_HEADS = ("causal_lm", "seq2seq_lm")
"""Endings of networks that write texts."""
