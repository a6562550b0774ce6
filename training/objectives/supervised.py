"""Learning from text that is given: cross entropy of the next token, and CTC for clips."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -100


def next_token_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy of each position's target, summed and divided by the number of targets of the optimizer step.

    Args:
        logits, targets: see `next_token_losses`.
        num_items: targets in all batches of the optimizer step; those of this batch alone by default.
    """
    total = next_token_losses(logits, targets).sum()
    return total / (num_items if num_items is not None else (targets != IGNORED).sum().clamp(min=1))


def next_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each position's target `[batch, positions]`, 0 where none counts.

    Args:
        logits: `[batch, positions, vocab]`; taken to fp32.
        targets: `[batch, positions]`, already shifted: the token that follows each position, -100 where none counts.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.shape[:2] != targets.shape:
        raise ValueError(f"logits of {tuple(logits.shape[:2])} positions do not fit targets of {tuple(targets.shape)}")
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


def ctc_loss(
    tokens: Sequence[torch.Tensor],
    labels: torch.Tensor,
    embeddings: torch.Tensor,
    *,
    blank: int,
    end: int,
    sharpness: float = 1.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Connectionist temporal classification of projected speech against the decoder's own embeddings, a token.

    Each projected token is scored by its products with the embeddings, so that what is heard as a word comes to lie
    where the decoder has that word, and nothing is added to the model. CTC: Graves et al., ICML 2006.

    Args:
        tokens: projected clips `[tokens, width]`, one for each row.
        labels: `[rows, length]`, what each clip says, -100 elsewhere; a row without any label teaches nothing.
        embeddings: `[vocabulary, width]`.
        blank: id of the token that stands for nothing heard.
        end: id of the token that ends an answer; it is not heard.
        sharpness: factor of the products.
        num_items: tokens of the targets, by default those of this batch.

    Raises:
        ValueError: not one clip in every row.
    """
    if len(tokens) != len(labels):
        raise ValueError(f"CTC needs one clip in every row, got {len(tokens)} clips in {len(labels)} rows")
    scores = (sharpness * torch.cat(list(tokens)).float() @ embeddings.float().T).log_softmax(-1)
    targets = ctc_targets(labels, end)
    total = _ctc_sum(list(scores.split([len(clip) for clip in tokens])), targets, labels, blank)
    return total / (max(1, sum(len(target) for target in targets)) if num_items is None else num_items)


def letter_ctc_loss(
    heard: Sequence[torch.Tensor],
    labels: torch.Tensor,
    spell: Callable[[torch.Tensor], torch.Tensor],
    *,
    end: int,
    num_items: torch.Tensor | int,
) -> torch.Tensor:
    """The same of the letters of what is said, a token, so that both kinds of CTC weigh alike.

    Args:
        heard: log-probabilities of letters, `[tokens, letters]`, one clip for each row; 0 stands for nothing heard.
        labels, end, num_items: see `ctc_loss`.
        spell: gives the letters of ids.
    """
    return _ctc_sum(heard, [spell(target) for target in ctc_targets(labels, end)], labels, 0) / num_items


def line_ctc_loss(
    read: torch.Tensor,
    labels: torch.Tensor,
    lines_of: Callable[[torch.Tensor], list[torch.Tensor]],
    *,
    end: int,
    num_items: torch.Tensor | int,
) -> torch.Tensor:
    """CTC of the letters of each line that is written in a picture, a token of its text.

    Args:
        read: log-probabilities of letters, `[pictures, lines, columns, letters]`, one picture for each row.
        labels, end, num_items: see `ctc_loss`.
        lines_of: gives the letters of each line of ids, as many lines as are read.

    Raises:
        ValueError: not one picture in every row.
    """
    if len(read) != len(labels):
        raise ValueError(f"CTC needs one picture in every row, got {len(read)} pictures in {len(labels)} rows")
    lines = [line for target in ctc_targets(labels, end) for line in lines_of(target)]
    return _ctc_sum(list(read.flatten(0, 1)), lines, labels.repeat_interleave(read.shape[1], 0), 0) / num_items


def place_loss(logits: torch.Tensor, classes: Sequence[torch.Tensor]) -> torch.Tensor:
    """How badly places tell what pictures show, where nobody says at which place: each thing at one of them at least
    (the noisy-or of multiple-instance learning: Maron and Lozano-Perez, NIPS 1997), and nothing else at any.

    Args:
        logits: of what is at each place, `[pictures, places, classes]`; class 0 is nothing.
        classes: of all things in each picture, `[things]`.

    Returns:
        The sum over pictures of the negative log-likelihoods, that of the second kind a place.
    """
    scores = logits.log_softmax(-1)
    shown = torch.zeros(len(logits), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for row, things in zip(shown, classes, strict=True):
        row[things] = True
    shown[:, 0] = True
    other = scores.masked_fill(~shown[:, None], -torch.inf).logsumexp(-1).mean(1)
    shown[:, 0] = False
    pictures, things = shown.nonzero(as_tuple=True)
    nowhere = torch.log1p(-scores[pictures, :, things].exp().clamp(max=1 - 1e-4)).sum(-1)
    somewhere = torch.log1p(-nowhere.exp().clamp(max=1 - 1e-6))
    return -(other.sum() + somewhere.sum())


def _ctc_sum(
    scores: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], labels: torch.Tensor, blank: int
) -> torch.Tensor:
    """CTC of `targets`, summed over the rows that have labels; `scores` are log-probabilities of each clip."""
    losses = F.ctc_loss(
        nn.utils.rnn.pad_sequence(list(scores)),
        torch.cat(list(targets)),
        torch.tensor([len(clip) for clip in scores]),
        torch.tensor([len(target) for target in targets]),
        blank=blank,
        reduction="none",
        zero_infinity=True,  # a clip with fewer tokens than its text teaches nothing
    )
    return losses.masked_fill(~(labels != IGNORED).any(dim=1), 0).sum()


def ctc_targets(labels: torch.Tensor, end: int) -> list[torch.Tensor]:
    """The tokens that are heard in each row of `labels` `[rows, length]`."""
    return [row[(row != IGNORED) & (row != end)] for row in labels]


def response_mask(labels: torch.Tensor, llavamod_compat: bool = False) -> torch.Tensor:
    """Where a hidden state predicts a labelled token: one place before the token.

    Args:
        labels: `[batch, length]`, -100 where a token is not to be predicted.
        llavamod_compat: at the token itself, as LLaVA-MoD released it: each answer's first token is then never learnt.
    """
    labelled = labels != IGNORED
    return labelled if llavamod_compat else torch.nn.functional.pad(labelled[:, 1:], (0, 1))
