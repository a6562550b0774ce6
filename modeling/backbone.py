"""Towers, projectors, router and decoder: media encoded, spliced and decoded with a route."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_name import CACHE, given_cache
from .configuration_mixlora import MixLoraConfig, MixLoraTextConfig
from .decoder import RoutedDecoder, RoutedPreTrainedModel
from .growing_cache import growing
from .idle import Idle, trained_adapters
from .inner_loading import InnerLoading
from .input_checks import check_rows
from .long_attention import long_layout
from .lora_experts import Usage
from .masks import check_mask, count_positions
from .media_encoding import MediaEncoding
from .packing import packing_of
from .projectors import Projector, SeparatorProjector, WhiteningProjector
from .ranks import in_process_group
from .rope_switch import keep, kept_layer, must_rebuild_all, replace_rows, stale_rows
from .routed_lora import Route, is_named, pair_size
from .router import ModalityRouter
from .row_windows import windows_of
from .speech_context import DepthwiseConv, SpeechContext
from .speech_letters import SpeechLetters
from .spelling import SpelledTokens
from .towers import build_speech_tower, build_vision_tower
from .vision_detail import DetailHead, VisionDetail
from .vision_letters import VisionLetters
from .vision_names import END, VisionNames

PLACEMENT = (
    *("_no_split_modules", "_skip_keys_device_placement"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
)
PARTS = (
    *("vision_tower", "vision_projector", "vision_detail", "vision_letters", "vision_names"),
    *("speech_tower", "speech_context", "speech_letters", "speech_projector"),
)
"""Beside the decoder, and frozen or trained each by itself."""


@dataclass
class RoutedOutput(BaseModelOutputWithPast):
    """Hidden states, and where asked for:

    Attributes:
        aux_loss: how unevenly LoRA experts are used, a scalar, 1 where all are used alike; None where none acted. Of
            several ranks that train, the mean is that of all rows.
    """

    aux_loss: torch.Tensor | None = None


class MixLoraPreTrainedModel(RoutedPreTrainedModel):
    """The multimodal models' common part."""

    config_class = MixLoraConfig
    input_modalities = ("image", "audio", "text")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SeparatorProjector):
            nn.init.zeros_(module.row_separator)
            nn.init.zeros_(module.global_separator)
        if isinstance(module, WhiteningProjector):
            nn.init.eye_(module.basis)
        if isinstance(module, SpelledTokens):
            for buffer in module.buffers(recurse=False):
                nn.init.zeros_(buffer)
        if isinstance(module, VisionNames):
            nn.init.constant_(module.names, END)
            nn.init.zeros_(module.kinds)
        if isinstance(module, DepthwiseConv | DetailHead):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for module in self.modules():
            if hasattr(module, "timm_model") and module.supports_gradient_checkpointing:
                module._set_gradient_checkpointing(enable)  # a switch of its own, which transformers' walk passes by


class MixLoraModel(InnerLoading, MediaEncoding, MixLoraPreTrainedModel):
    """Towers, projectors and the routed decoder, without the head."""

    def __init__(self, config: MixLoraConfig):
        super().__init__(config)
        text: Any = config.text_config
        hidden = config.projector_hidden_size or text.hidden_size
        self.language_model = RoutedDecoder(text)
        self.router = ModalityRouter(config)
        if config.vision_config is not None:
            self.vision_tower = build_vision_tower(config)
            kind = SeparatorProjector if self.vision_tower.separators else Projector
            size = self.vision_tower.feature_size
            self.vision_projector = kind(size, hidden, text.hidden_size, config.projector_norm)
            for name in ("vision_detail", "vision_letters", "vision_names"):
                if getattr(config, name) is not None and self.vision_tower.tokens is None:
                    raise ValueError(
                        f"{name}: {config.vision_config.model_type} cuts pictures into crops; it needs a tower "
                        "that sees them whole"
                    )
            if config.vision_letters is not None:
                self.vision_letters = VisionLetters(text.vocab_size, **config.vision_letters)
            if config.vision_names is not None:
                self.vision_names = VisionNames(size, **config.vision_names)
            if config.vision_detail is not None:
                self.vision_detail = VisionDetail(self.vision_tower.side, text.hidden_size, **config.vision_detail)
        if config.speech_config is not None:
            self.speech_tower = build_speech_tower(config)
            size = self.speech_tower.feature_size * config.speech_stack
            self.speech_projector = nn.ModuleDict()
            if config.speech_context is not None:
                stride = config.speech_context["stride"]
                self.speech_context = SpeechContext(size // stride, hidden, **config.speech_context)
                size = hidden * stride
            if config.speech_letters is not None:
                self.speech_letters = SpeechLetters(hidden, text.vocab_size, **config.speech_letters)
            for name in ("speech", "vision_speech"):
                self.speech_projector[name] = (
                    Projector(size, hidden, text.hidden_size, config.projector_norm)
                    if config.speech_context is None
                    else WhiteningProjector(size, text.hidden_size)  # the blocks before it are layers enough
                )
        for name, spec in config.adapters.items():
            self.add_pairs(name, spec)
        self.gradient_checkpointing = False
        self.post_init()

    def post_init(self) -> None:
        """As in transformers, which asks direct children alone how their layers are to be placed and kept."""
        for tower in (getattr(self, "vision_tower", None), getattr(self, "speech_tower", None)):
            for name in PLACEMENT if tower is not None else ():
                setattr(tower, name, getattr(tower.encoder, name, None))
            if tower is not None:  # an encoder's class may name its decoder's layers too, and FSDP looks for each
                classes = {type(module).__name__ for module in tower.modules()}
                tower._no_split_modules = [name for name in tower._no_split_modules or () if name in classes]
        super().post_init()

    def add_pairs(self, name: str, spec: dict[str, Any]) -> None:
        """Adds an adapter's fresh pairs to the projections that its entry of `config.adapters` names.

        Raises:
            ValueError: it names something else.
        """
        modules = self.language_model.projections()
        for target in spec["target_modules"] or ():
            if not any(is_named(path, target) for path in modules):
                raise ValueError(
                    f"adapters[{name!r}]: target_modules names {target!r}, which is no projection of this decoder, "
                    f"such as {min(modules)}"
                )
        for path, module in modules.items():
            if size := pair_size(spec, path):
                module.add_adapter(name, *size, spec["dropout"], spec.get("experts", 0), spec.get("top_k", 0))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def train(self, mode: bool = True) -> "MixLoraModel":
        """As usual, but a frozen tower or projector stays in `eval`, and batch norms keep their statistics."""
        super().train(mode)
        for name in PARTS:
            module = getattr(self, name, None)
            if module is None:
                continue
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
            for child in module.modules():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    child.eval()
        return self

    def route(
        self, adapter_ids: torch.Tensor | None, input_ids: torch.Tensor | None, past_key_values: Cache | None
    ) -> Route:
        """The batch's [`Route`]: from `adapter_ids` `[batch]`, or from what the rows contain.

        Raises:
            ValueError: no `adapter_ids` where the prompt cannot tell them (a filled cache, or `inputs_embeds`).
        """
        if adapter_ids is None:
            unseen = input_ids is None or (past_key_values is not None and past_key_values.get_seq_length() > 0)
            if unseen and not self.config.adapters:
                return Route()
            if unseen:
                raise ValueError(
                    "adapter_ids is needed with inputs_embeds or a filled cache: the rest of the conversation, "
                    "which decides the route, cannot be seen here. Pass what model.router(prompt_ids) gives."
                )
            adapter_ids = self.router(input_ids)
        if torch.compiler.is_compiling():
            return Route.from_adapter_ids(adapter_ids, self.router.names, masked=True)
        everywhere = trained_adapters(self.language_model)
        length = 1 if input_ids is None else input_ids.shape[1]
        return Route.from_adapter_ids(adapter_ids, self.router.names, everywhere=everywhere, length=length)

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
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_aux_loss: bool | torch.Tensor = False,
        wanted: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[batch, length, width]`. Arguments as in [`MixLoraForConditionalGeneration.forward`].

        Args:
            wanted: BoolTensor `[batch, length]`, tokens whose states are looked at; those of others may be zeros.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        past_key_values = given_cache(past_key_values, cache)
        tokens: torch.Tensor = inputs_embeds if input_ids is None else input_ids
        check_rows(tokens, attention_mask, adapter_ids, row_lengths, past_key_values)
        route = self.route(adapter_ids, input_ids, past_key_values)
        has_media = pixel_values is not None or input_features is not None or bool(mm_encoder_outputs)
        route = replace(route, quick=self.training or not self.config.exact_base)
        if inputs_embeds is None:
            idle = Idle(self, input_ids.device)
            media = self.encode_media(
                input_ids,
                pixel_values=pixel_values,
                image_sizes=image_sizes,
                image_attention_mask=image_attention_mask,
                input_features=input_features,
                input_features_mask=input_features_mask,
                mm_encoder_outputs=mm_encoder_outputs,
                idle=idle,
            )
            inputs_embeds = idle.added_to(self.embed(input_ids, media))
        elif has_media:
            raise ValueError("media need input_ids: with inputs_embeds the placeholders cannot be seen")
        if (self.config.text_config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = None if self.training else growing(DynamicCache(config=self.config.text_config))
        check_mask(attention_mask, position_ids, self.language_model.rotary_emb.varies)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, past_key_values)
        so_far = position_ids.amax(dim=-1) + 1
        row_lengths = so_far if row_lengths is None else torch.maximum(row_lengths.to(so_far.device), so_far)
        if not torch.compiler.is_compiling():  # `generate` has done so before a compiled step
            self.rebuild_cache(past_key_values, attention_mask, row_lengths, adapter_ids)
        rows = output_aux_loss if isinstance(output_aux_loss, torch.Tensor) else None
        if rows is not None or output_aux_loss:
            route = replace(route, usage=Usage.of(inputs_embeds, attention_mask, rows))
        kwargs |= {"wanted": wanted, "still": self._still_rows(input_ids, route, past_key_values)}
        outputs = self._decode(
            inputs_embeds, route, attention_mask, position_ids, past_key_values, row_lengths, **kwargs
        )
        rotary = self.language_model.rotary_emb
        if past_key_values is not None and rotary.varies:
            layers = self.config.text_config.num_hidden_layers
            keep(past_key_values, layers, inputs_embeds, rotary.is_long(row_lengths))
        if route.usage is not None:
            outputs = RoutedOutput(**outputs, aux_loss=route.usage.close())
        if not torch.compiler.is_compiling():
            outputs.quick = route.quick  # type: ignore[attr-defined]  # for the head
        return outputs

    def _still_rows(
        self, input_ids: torch.Tensor | None, route: Route, past_key_values: Cache | None
    ) -> list[bool] | None:
        """For each row whether no gradient flows through it: no adapter acts, it holds no media, the base is frozen.

        None where nothing is to be gained from that, and among several ranks, which all run alike.
        """
        learning = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not learning or input_ids is None or past_key_values is not None or in_process_group():
            return None
        if any(p.requires_grad and ".lora_" not in name for name, p in self.language_model.named_parameters()):
            return None
        media = [token for token in (self.config.image_token_id, self.config.audio_token_id) if token is not None]
        moved = torch.isin(input_ids, torch.tensor(media, dtype=torch.long, device=input_ids.device)).any(-1)
        for _, where in route.rows:
            moved[slice(None) if where is None else where] = True
        return (~moved).tolist()

    def _decode(
        self,
        inputs_embeds: torch.Tensor,
        route: Route,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
        row_lengths: torch.Tensor,
        still: list[bool] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        config: MixLoraTextConfig = self.config.text_config  # type: ignore[assignment]  # a dict only before it is built
        mask = None
        kwargs["layout"] = long_layout(
            config, position_ids, attention_mask, past_key_values, always=kwargs.get("probe") is not None
        )
        for asked in ("output_hidden_states", "output_attentions"):
            kwargs.setdefault(asked, getattr(self.config, asked, False))
        if kwargs["layout"] is None and not (kwargs["output_hidden_states"] or kwargs["output_attentions"]):
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            kwargs["packings"] = packing_of(config, attention_mask, inputs_embeds.shape[1], past, route, still)
            if config.sliding_window is None and route.quick:
                backend = config._attn_implementation
                kwargs["windows"] = windows_of(attention_mask, past_key_values, inputs_embeds.shape[1], backend)
        if kwargs["layout"] is None and not kwargs.get("packings"):
            create_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
            mask = create_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: past_key_values},
            )
        return self.language_model(inputs_embeds, route, position_ids, mask, past_key_values, row_lengths, **kwargs)

    def rebuild_cache(
        self,
        past_key_values: Cache | None,
        attention_mask: torch.Tensor | None,
        row_lengths: torch.Tensor,
        adapter_ids: torch.Tensor | None = None,
    ) -> None:
        """Computes the cached past of rows again whose rotary factors change by growing to `row_lengths` `[batch]`.

        `forward` does so by itself, unless it is compiled. See [`rope_switch`].

        Args:
            attention_mask: `[batch, length]`, of the past at least; None where all tokens are real.

        Raises:
            ValueError: a row must be rebuilt, but the mask is not of that shape, or the cache lacks its embeddings.
        """
        rotary, layers = self.language_model.rotary_emb, self.config.text_config.num_hidden_layers
        past = int(past_key_values.get_seq_length()) if past_key_values is not None and rotary.varies else 0
        if past_key_values is None or not past:
            return
        is_long = rotary.is_long(row_lengths)
        rows = stale_rows(past_key_values, layers, past, is_long, always=rotary.rope_type == "dynamic")
        if not len(rows):
            return
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"row {int(rows[0])} passes {rotary.original_length} tokens: a mask [batch, length] is needed"
            )
        if must_rebuild_all(past_key_values, layers):
            rows = torch.arange(len(is_long), device=is_long.device)
        kept = kept_layer(past_key_values, layers).keys
        embeds = kept[rows.to(kept.device), 0, :past].to(is_long.device)
        mask = None if attention_mask is None else attention_mask[rows, :past]
        route = Route() if adapter_ids is None else Route.from_adapter_ids(adapter_ids[rows], self.router.names)
        fresh = DynamicCache(config=self.config.text_config)
        self._decode(embeds, route, mask, count_positions(embeds, mask, None), fresh, row_lengths[rows])
        replace_rows(past_key_values, fresh, layers, rows, is_long[rows])
