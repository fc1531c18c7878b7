"""How likely a language model finds the text that is expected of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Record

if TYPE_CHECKING:
    from torch import Tensor


def likelihood(sample: Sample, logits: "Tensor") -> Record:
    """Return `nll` (−Σ ln p), `correct` (how many were the likeliest) and `tokens` over a sample's scored tokens.

    Every token is predicted from the true ones before it; log-probabilities are float32.

    Args:
        sample: a text.
        logits: (T, vocabulary), padded on the right.

    Raises:
        InputError: logits that are not finite.
    """
    import torch

    places = torch.tensor(sample.scored, device=logits.device)
    return likelihood_of([sample.input_ids[place] for place in sample.scored], logits[places - 1])


def likelihood_of(expected: Sequence[int], logits: "Tensor") -> Record:
    """Return `likelihood` of tokens from the logits that predict each of them, (tokens, vocabulary)."""
    import torch

    from sensmerge.tasks.networks.networks import finite

    target = torch.tensor(expected, device=logits.device)
    # Only the scored positions of one sample become float32: a whole batch × vocabulary would be large.
    log_p = logits.float().log_softmax(-1)
    return {
        "nll": -finite(log_p.gather(-1, target[:, None]).sum(dtype=torch.float64)).item(),
        "correct": int((log_p.argmax(-1) == target).sum()),
        "tokens": len(target),
    }


def tokens_read(record: Record) -> dict[str, Any]:
    """Return `answer` and `right` for people, of a text that was read and not written; see `likelihood`."""
    correct, tokens = record["correct"], record["tokens"]
    return {"answer": f"{correct} of {tokens} tokens", "right": correct == tokens}


def text_sample(ids: list[int], where: str) -> Sample:
    """Return a text of which every token counts but the first; raises InputError for one without a token to predict."""
    if len(ids) < 2:
        raise InputError(f"{where}: a text of {len(ids)} tokens has no loss; leave the row out")
    return Sample({"input_ids": ids})
