"""The multimodal model with its head: loss, generation, loading and saving."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .adapter_methods import AdapterMethods
from .backbone import MixLoraModel, MixLoraPreTrainedModel
from .base_checkpoint import checkpoint_folder, describe_base, is_base_tensor, load_base, load_weights
from .cache_name import CACHE, given_cache
from .configuration_mixlora import FOR_LONG_ROWS, MixLoraConfig
from .generation_mixlora import RoutedGenerationMixin
from .input_checks import check_labels
from .media_encoding import MediaOutput
from .parts import Part, build
from .phi4_checkpoint import ADAPTER_FOLDERS, HUB_OPTIONS, load_phi4, phi4_layout
from .routed_function import apply_linear
from .router import ModalityRouter

IGNORED = -100  # no loss there, as everywhere in transformers


def wanted_tokens(input_ids: torch.Tensor | None, logits_to_keep: int | torch.Tensor) -> torch.Tensor | None:
    """Where logits are made, BoolTensor `[batch, length]`; None where that is everywhere, or nothing can be spared."""
    everywhere = isinstance(logits_to_keep, int) and logits_to_keep == 0
    if input_ids is None or input_ids.dim() != 2 or everywhere or torch.compiler.is_compiling():
        return None
    if input_ids.shape[1] == 1:
        return None
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    wanted[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep] = True
    return wanted


@dataclass
class RoutedCausalOutput(CausalLMOutputWithPast):
    """As in transformers, and `aux_loss`, see [`RoutedOutput`]."""

    aux_loss: torch.Tensor | None = None


class MixLoraForConditionalGeneration(AdapterMethods, MixLoraPreTrainedModel, RoutedGenerationMixin):
    """The model with its head: text from text, pictures and speech, every row on its own route."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MixLoraConfig):
        super().__init__(config)
        self.model = MixLoraModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        decoder: Part,
        vision_tower: Part | None = None,
        speech_tower: Part | None = None,
        adapters: dict[str, dict[str, Any]] | None = None,
        refer_to_base: bool = False,
        **options: Any,
    ) -> "MixLoraForConditionalGeneration":
        """A new model around a decoder, with fresh projectors and adapters.

        Args:
            decoder: a folder, a hub id, a config or a loaded model of a Llama-like family, or a `MixLoraTextConfig`.
            vision_tower, speech_tower: the same for encoders.
            adapters: see [`MixLoraConfig`].
            refer_to_base: `save_pretrained` writes no decoder but names this one (a folder or a hub id), pinned by the
                SHA-256 of its weights.
            options: further fields of [`MixLoraConfig`]; `image_token_id` and `audio_token_id` are needed with towers.
        """
        if refer_to_base:
            if not isinstance(decoder, str | Path):
                raise ValueError(f"refer_to_base needs a folder or a hub id as decoder, got {type(decoder).__name__}")
            options["base_model"] = describe_base(decoder)
        return build(cls, decoder, vision_tower, speech_tower, {"adapters": adapters, **options})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Where the config names a base, the decoder is read from there and its sum is checked.

        Both layouts of Phi-4-Multimodal load as they lie on the hub: Microsoft's shards, and transformers' own layout
        with the folders `vision-lora` and `speech-lora`.

        Args:
            kwargs: as in transformers, and `long_context` or `sparse_prefill` in place of the decoder's own.

        Raises:
            ValueError: the base's weights are not those that the checkpoint names; or a Phi-4 checkpoint lacks
                tensors, or holds a `lora_B` of zeros.
        """
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        for_long_rows = {field: kwargs.pop(field) for field in FOR_LONG_ROWS if field in kwargs}
        hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
        if (config is None and name is not None) or isinstance(config, str | Path):
            config = cls.config_class.from_pretrained(config or name, **hub)
        if for_long_rows:
            kwargs["config"] = config = copy.deepcopy(config)
            config.set_long_context(**for_long_rows)
        if name is None:
            return super().from_pretrained(name, *args, **kwargs)
        layout = phi4_layout(name, hub)
        if layout is None and not config.base_model:
            return super().from_pretrained(name, *args, **kwargs)
        # Microsoft's shards hold the adapters too
        folder = checkpoint_folder(name, "*-lora/*" if layout == "phi4mm" else None, **hub)
        kwargs = {option: value for option, value in kwargs.items() if option not in HUB_OPTIONS}
        if layout is None:
            state = load_base(config.base_model) | load_weights(folder)
        else:
            state = load_phi4(folder, layout)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"config": config, "state_dict": state, "output_loading_info": True}
        model, info = super().from_pretrained(None, *args, **kwargs)
        if layout is not None:
            if info["missing_keys"]:
                raise ValueError(f"{folder} lacks tensors of this model: {sorted(info['missing_keys'])[:5]}")
            for adapter, subfolder in ADAPTER_FOLDERS.items():
                if adapter not in config.adapters and (folder / subfolder).is_dir():
                    model.load_adapter(folder / subfolder, adapter)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in transformers; the decoder is left out where the config names a base."""
        if self.config.base_model:
            state = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {name: value for name, value in state.items() if not is_base_tensor(name)}
        super().save_pretrained(save_directory, **kwargs)

    @property
    def router(self) -> ModalityRouter:
        """The router: `router(input_ids)` gives `adapter_ids`."""
        return self.model.router

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, *args: Any, **kwargs: Any) -> MediaOutput:
        """See [`MixLoraModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_audio_features(self, *args: Any, **kwargs: Any) -> MediaOutput:
        """See [`MixLoraModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of all parameters by the groups that a training stage names; those of `TOWER.unused` never act."""
        groups: dict[str, list[str]] = {}
        towers = {name: getattr(self.model, name, None) for name in ("vision_tower", "speech_tower")}
        unused = tuple(
            f"model.{name}.{prefix}" for name, tower in towers.items() for prefix in getattr(tower, "unused", tuple)()
        )
        for name, _ in self.named_parameters():
            parts = name.removeprefix("model.").split(".")
            if name.startswith(unused):
                group = f"{parts[0]}.unused"
            elif len(parts) > 2 and parts[-3] in ("lora_A", "lora_B", "lora_experts"):
                group = f"adapter.{parts[-2]}"
            elif parts[0] in ("language_model", "lm_head"):
                group = "decoder"
            elif parts[0] == "speech_projector":
                group = f"speech_projector.{parts[1]}"
            else:
                group = parts[0]
            groups.setdefault(group, []).append(name)
        return groups

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        adapter_ids: torch.LongTensor | None = None,
        row_lengths: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        within: Callable[["MixLoraForConditionalGeneration"], Any] | None = None,
        output_aux_loss: bool | torch.Tensor = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given.

        Args:
            input_ids, attention_mask: `[batch, length]`.
            past_key_values, cache: two names of one argument, as transformers had it before 5.24, and has it since.
            pixel_values: `[crops, 3, height, width]` of all pictures in order of appearance.
            image_sizes: `[images, 2]`, height and width.
            image_attention_mask: `[crops, patches_h, patches_w]`, 0 at patches of padding (Phi-4's towers).
            input_features: mel frames `[clips, frames, mels]` of all clips in order of appearance.
            input_features_mask: `[clips, frames]`.
            mm_encoder_outputs: media encoded before, see [`MixLoraModel.encode_media`].
            adapter_ids: `[batch]`, index into `router.names`, -1 for the base; the router's choice by default.
            row_lengths: `[batch]`, real tokens of each row, those to come included; picks LongRoPE's factors. Those so
                far by default.
            labels: `[batch, length]`, -100 where nothing is learnt; at placeholders nothing is in any case.
            logits_to_keep: the last n positions, or positions as a tensor; 0 for all.
            output_aux_loss: give `aux_loss`, how unevenly LoRA experts are used (see [`Usage`]); `loss` is without it.
                A BoolTensor `[batch]` names the rows that count.
            within: what to do in place of all this, with this module: a training step that looks at other things than
                logits. Wrappers such as DDP and FSDP see what is done inside a forward, and nothing else.
        """
        if within is not None:
            return within(self)
        if kwargs.get("adapter_names") is not None:
            self._no_global_adapter()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_attention_mask=image_attention_mask,
            input_features=input_features,
            input_features_mask=input_features_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            adapter_ids=adapter_ids,
            row_lengths=row_lengths,
            use_cache=use_cache,
            output_aux_loss=output_aux_loss,
            wanted=wanted_tokens(input_ids, logits_to_keep),
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        is_quick = getattr(outputs, "quick", False)
        logits = apply_linear(self.lm_head, hidden_states) if is_quick else self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            loss = self.loss_function(
                logits,
                self._learnable(labels),
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return RoutedCausalOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=outputs.get("aux_loss"),
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _learnable(self, labels: torch.Tensor) -> torch.Tensor:
        """`labels` without placeholders: a caller who passes the ids as labels means the text."""
        for placeholder in (self.config.image_token_id, self.config.audio_token_id):
            if placeholder is not None:
                labels = labels.masked_fill(labels == placeholder, IGNORED)
        return labels
