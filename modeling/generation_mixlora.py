"""Generation with a route: decided once, kept for beams, samples, drafts and every class of cache."""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.masking_utils import create_masks_for_generate

from .cache_name import CACHE, NAMES, given_cache
from .growing_cache import growing
from .guides import GuidedAnswers
from .input_checks import check_ids
from .media_encoding import MediaOutput
from .quantized_cache import keep_rows_apart, settings_within_rows
from .rope import RotaryEmbedding

MEDIA = (
    *("pixel_values", "image_sizes", "image_attention_mask"),
    *("input_features", "input_features_mask", "mm_encoder_outputs"),
)
NOT_FOR_OTHERS = ("adapter_ids", "row_lengths", "mm_encoder_outputs")
"""Arguments that an assistant of another class does not understand."""


class DraftsUpToSwitch:
    """Another generator's candidates, cut where the row's rotary factors change: one pass has one set of factors.

    Args:
        generator: any candidate generator of transformers.
        rotary: the decoder's.
        padding: tokens of padding in the prompt.
    """

    def __init__(self, generator: Any, rotary: RotaryEmbedding, padding: int):
        self.generator, self.rotary, self.padding = generator, rotary, padding

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids `[1, length + candidates]`, and logits `[1, candidates, vocabulary]` where the generator has them."""
        ids, logits = self.generator.get_candidates(input_ids, **kwargs)
        room = self.rotary.room(input_ids.shape[1] - self.padding)
        if room is None:
            return ids, logits
        return ids[:, : input_ids.shape[1] + room], None if logits is None or room == 0 else logits[:, :room]


class RoutedGenerationMixin(GuidedAnswers, GenerationMixin):
    """transformers' generation for a model with a router, towers and rotary factors that follow a row's length."""

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers. The route is decided once, from the prompt, and media are encoded once.

        `ctc_weight` and `told_weight` are for this call what `speech_ctc_weight` and `vision_told_weight` of the
        config are by default.

        Raises:
            ValueError: what cannot be done row by row is asked for, such as `guidance_scale`.
        """
        scale = kwargs.get("guidance_scale", (generation_config or self.generation_config).guidance_scale)
        if scale not in (None, 1):
            raise ValueError(
                f"guidance_scale is {scale}, but a prompt without what it asks for would have no media and another "
                "route here: leave guidance_scale out"
            )
        weights = {name: kwargs.pop(name, None) for name in ("ctc_weight", "told_weight")}
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            input_ids = self._beginning(generation_config or self.generation_config)
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            check_ids(input_ids)
        chunk = kwargs.get("prefill_chunk_size", (generation_config or self.generation_config).prefill_chunk_size)
        if chunk is not None and kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size needs input_ids: transformers does not cut inputs_embeds into chunks")
        if generation_config is None:
            kwargs["suppress_tokens"] = self._suppressed(kwargs, self.generation_config)
        else:  # transformers takes a config or arguments, not both
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = self._suppressed(kwargs, generation_config)
            kwargs.pop("suppress_tokens", None)
        past = given_cache(*(kwargs.pop(name, None) for name in NAMES))
        if past is not None:
            kwargs[CACHE] = past
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            seen = int(past.get_seq_length()) if past is not None else 0
            if kwargs.get("adapter_ids") is None:
                kwargs["adapter_ids"] = self.router.continued(input_ids, seen)
            media = {name: kwargs.pop(name, None) for name in MEDIA}
            if seen and generation_config is not None and generation_config.is_assistant:
                media = {}  # each draft is asked for with all media; they are in the cache since the first
            if encoded := self.model.encode_media(input_ids[:, seen:], **media, conversation_ids=input_ids):
                guides = self.guides(input_ids, encoded, self._ends(kwargs, generation_config), **weights)
                if guides:
                    given = kwargs.get("logits_processor") or ()
                    kwargs["logits_processor"] = LogitsProcessorList([*given, *guides])
                kwargs["mm_encoder_outputs"] = {
                    kind: MediaOutput(pooler_output=output.pooler_output, rows=output.rows)
                    for kind, output in encoded.items()
                }
            mask = kwargs.get("attention_mask")
            if self.model.language_model.rotary_emb.varies and mask is not None and mask.dim() == 2:
                # so that the first chunk of a long prompt already takes the long factors
                kwargs.setdefault("row_lengths", mask.sum(-1))
        return super().generate(input_ids, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, after the cache of rows that pass LongRoPE's switch was rebuilt.

        `forward` does so too, but not where it is compiled, nor with the mask `[batch, 1, length, cached]` that a
        cache of fixed length gets here.
        """
        past_key_values = given_cache(past_key_values, cache)
        if past_key_values is not None and kwargs.get("mm_encoder_outputs") and not past_key_values.get_seq_length():
            is_first_iteration = (
                True  # an assistant's first pass needs the media too; transformers calls it a later one
            )
        positions = kwargs.get("position_ids")  # up to the last token of this step
        if past_key_values is not None and past_key_values.is_compileable and positions is not None:
            if attention_mask is None or attention_mask.dim() == 2:
                lengths = positions.amax(-1).expand(len(input_ids)) + 1
                if kwargs.get("row_lengths") is not None:
                    lengths = torch.maximum(lengths, kwargs["row_lengths"].to(lengths.device))
                self.model.rebuild_cache(past_key_values, attention_mask, lengths, kwargs.get("adapter_ids"))
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: past_key_values},
            **kwargs,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; a cache made here grows in place if it is of the default kind; a quantized one keeps
        rows apart."""
        head_dim, is_given = self.config.text_config.head_dim, model_kwargs.get(CACHE) is not None
        if generation_config.cache_implementation == "quantized":
            generation_config.cache_config = settings_within_rows(generation_config.cache_config, head_dim)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        keep_rows_apart(model_kwargs.get(CACHE), head_dim)
        if not is_given and isinstance(model_kwargs.get(CACHE), DynamicCache):
            growing(model_kwargs[CACHE])
        return result

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers packs all requests into one row there, but a route and rotary factors are a row's own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching packs all requests into one row, but here each row has its own route: use generate, "
            "which takes rows of any kind together"
        )

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The mask of a step with a cache of fixed length; dual chunk attention needs to know the real tokens."""
        if self.config.text_config.long_context is None:
            return create_masks_for_generate(attention_mask=attention_mask, **kwargs)
        room = kwargs[CACHE].get_max_length()
        if attention_mask is None or kwargs.get("position_ids") is None or room < attention_mask.shape[1]:
            return attention_mask
        # One shape for all steps, so that they compile once.
        return torch.nn.functional.pad(attention_mask, (0, room - attention_mask.shape[1]))

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """As in transformers, for assistants of any class, and with no draft that spans LongRoPE's switch.

        Raises:
            ValueError: drafts are asked of the model's own first layers.
        """
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit drafts with a model's own first layers, which were not trained to answer here: "
                "draft with an assistant_model or with prompt_lookup_num_tokens"
            )
        assistant, model_kwargs = kwargs.get("assistant_model"), kwargs["model_kwargs"]
        if assistant is not None and not isinstance(assistant, RoutedGenerationMixin):
            shared = {name: value for name, value in model_kwargs.items() if name not in NOT_FOR_OTHERS}
            kwargs["model_kwargs"] = shared
        generator = super()._get_candidate_generator(**kwargs)
        rotary = self.model.language_model.rotary_emb
        if not rotary.varies:
            return generator
        mask = model_kwargs.get("attention_mask")
        return DraftsUpToSwitch(generator, rotary, 0 if mask is None else int((mask == 0).sum()))

    def _beginning(self, config: GenerationConfig) -> torch.Tensor | None:
        """Ids `[1, 1]` of a text from nothing; None where the model has no token to begin with."""
        return None if config.bos_token_id is None else torch.tensor([[config.bos_token_id]], device=self.device)

    def _suppressed(self, kwargs: dict[str, Any], config: GenerationConfig) -> list[int] | None:
        """Tokens that are never an answer: a placeholder would ask for media that are not there."""
        given = kwargs.get("suppress_tokens", config.suppress_tokens) or []
        ours = [i for i in (self.config.image_token_id, self.config.audio_token_id) if i is not None]
        return sorted({*given, *ours}) or None

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor,
        mm_encoder_output: dict[str, MediaOutput],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, MediaOutput]:
        """Repeats each row's media `expand_size` times (beams, samples); transformers does so for pictures only."""
        expanded = {}
        for name, output in mm_encoder_output.items():
            items: list[torch.Tensor] = []
            rows: list[int] = []
            for row in sorted(set(output.rows)):
                mine = [item for item, owner in zip(output.pooler_output, output.rows, strict=True) if owner == row]
                for sample in range(expand_size):
                    items += mine
                    rows += [row * expand_size + sample] * len(mine)
            expanded[name] = MediaOutput(pooler_output=items, rows=rows)
        return expanded
