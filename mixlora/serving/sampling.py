"""How tokens of one row are chosen: its settings, and transformers' own processors made from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """Settings of one request. The defaults are greedy."""

    max_new_tokens: int = 64
    """Longest answer; fewer where the model's longest context ends."""
    temperature: float = 0.0
    """0: the most probable token each time."""
    top_p: float = 1.0
    """Only the most probable tokens that sum up to this."""
    top_k: int = 0
    """Only so many of the most probable tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1: what was said already becomes less probable."""
    seed: int | None = None
    """Equal seeds give equal answers, whatever else runs; None: a new one each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 5.0, "in 0..5"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10.0, "in 0.1..10"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in 0..2^63-1"),
            ("stop", all(self.stop), "without empty strings"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


class Chooser:
    """Chooses one row's tokens as `generate` would, had it the row alone.

    With a seed the draws equal those of `generate` after `torch.manual_seed(seed)`.

    Args:
        model: its generation config gives what `sampling` leaves open.
        prompt_length: tokens of the prompt.
    """

    def __init__(self, model: Any, sampling: Sampling, prompt_length: int) -> None:
        self.greedy = sampling.temperature == 0
        options: dict[str, Any] = {"do_sample": False}
        if not self.greedy:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        config, _ = model._prepare_generation_config(GenerationConfig(**options))
        config.repetition_penalty = sampling.repetition_penalty
        config.suppress_tokens = None  # placeholders: for all rows at once, see Batch
        model._prepare_special_tokens(config, device=model.device)
        eos = config._eos_token_tensor
        self.ends = frozenset() if eos is None else frozenset(eos.tolist())
        self._make_processors = partial(
            model._get_logits_processor, config, input_ids_seq_length=prompt_length, device=model.device
        )
        self.processors: LogitsProcessorList = self._make_processors()
        self._generator = torch.Generator(model.device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def follow(self, guides: Sequence[LogitsProcessor]) -> None:
        """Chooses with what is heard in a clip and told of a picture, as `generate` does."""
        self.processors = self._make_processors(logits_processor=LogitsProcessorList(guides))

    @property
    def plain(self) -> bool:
        """Whether the most probable token is taken as it is, so that many rows can share one `argmax`."""
        return self.greedy and not self.processors

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token after `ids` `[1, length]` from `logits` `[1, vocabulary]`."""
        scores = self.processors(ids, logits.float())
        if self.greedy:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
