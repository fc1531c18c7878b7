"""BLEU, by sacrebleu with its defaults: counts of each answer, and the score of many from their sums.

sacrebleu tokenises as the shared tasks of machine translation do; its signature here is
`nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`.
"""

import numpy as np

from sensmerge.tasks.kinds.scores import Columns, Record, Values

ORDER = 4
"""Words of the longest n-grams."""
BLEU_COUNTS = (
    *(f"{kind}_{n}" for kind in ("ngrams_right", "ngrams") for n in range(1, ORDER + 1)),
    "words",
    "words_expected",
)
"""Fields of a record: n-grams of an answer that are right, n-grams it has, its words, and those of what is expected."""


def bleu_counts(answer: str, expected: str) -> Record:
    """Return `BLEU_COUNTS` of an answer."""
    from sacrebleu.metrics import BLEU

    found = BLEU(max_ngram_order=ORDER, effective_order=True).sentence_score(answer, [expected])
    numbers = (*found.counts, *found.totals, found.sys_len, found.ref_len)
    return {name: int(number) for name, number in zip(BLEU_COUNTS, numbers, strict=True)}


def bleu(columns: Columns) -> Values:
    """Return the BLEU of samples, (..., samples, `BLEU_COUNTS`), from 0 to 100: (...)."""
    from sacrebleu.metrics import BLEU

    def score(sums: Columns) -> float:
        counts = [int(number) for number in sums]
        right, every, (words, expected) = counts[:ORDER], counts[ORDER : 2 * ORDER], counts[2 * ORDER :]
        return float(BLEU.compute_bleu(right, every, words, expected, smooth_method="exp", max_ngram_order=ORDER).score)

    return np.apply_along_axis(score, -1, columns.sum(axis=-2))
