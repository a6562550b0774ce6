"""Training objectives: tensors in, a scalar out. They know nothing of the trainer or the model."""

from mixlora.training.objectives.mimic import DIVERGENCES, mimic_loss
from mixlora.training.objectives.preference import PREFERENCES, preference_loss, sequence_log_probs
from mixlora.training.objectives.sparse import known_tokens, sparse_mimic_loss
from mixlora.training.objectives.supervised import (
    IGNORED,
    ctc_loss,
    ctc_targets,
    letter_ctc_loss,
    line_ctc_loss,
    next_token_loss,
    next_token_losses,
    place_loss,
    response_mask,
)

__all__ = [
    "DIVERGENCES",
    "IGNORED",
    "PREFERENCES",
    "ctc_loss",
    "ctc_targets",
    "letter_ctc_loss",
    "line_ctc_loss",
    "known_tokens",
    "mimic_loss",
    "next_token_loss",
    "next_token_losses",
    "place_loss",
    "preference_loss",
    "response_mask",
    "sequence_log_probs",
    "sparse_mimic_loss",
]
