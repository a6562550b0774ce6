"""The text decoder: routed attention and a routed gated MLP, stacked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from .attention import RMSNorm, RoutedAttention
from .cache_name import CACHE, given_cache
from .configuration_mixlora import MixLoraTextConfig
from .long_attention import LongAttention, Probe
from .lora_experts import LoraExperts
from .packing import Kept, Packing, unpack_all
from .rope import RotaryEmbedding
from .routed_lora import LoraDown, LoraUp, Route, RoutedLinear
from .row_layout import RowLayout


class RoutedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, each projection routed."""

    def __init__(self, config: MixLoraTextConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fused = config.fused_projections
        if self.fused:
            self.gate_up_proj = RoutedLinear(nn.Linear(width, 2 * inner, bias=bias))
        else:
            self.gate_proj = RoutedLinear(nn.Linear(width, inner, bias=bias))
            self.up_proj = RoutedLinear(nn.Linear(width, inner, bias=bias))
        self.down_proj = RoutedLinear(nn.Linear(inner, width, bias=bias))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """`[batch, length, width]` -> the same shape."""
        if self.fused:
            gate, up = self.gate_up_proj(x, route).chunk(2, dim=-1)  # gate first, as in Phi-3
        else:
            gate, up = self.gate_proj(x, route), self.up_proj(x, route)
        return self.down_proj(self.act_fn(gate) * up, route)


class RoutedPlainMLP(nn.Module):
    """`c_proj(act(c_fc(x)))`, each projection routed; the names are StarCoder2's."""

    def __init__(self, config: MixLoraTextConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.c_fc = RoutedLinear(nn.Linear(width, inner, bias=bias))
        self.c_proj = RoutedLinear(nn.Linear(inner, width, bias=bias))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """`[batch, length, width]` -> the same shape."""
        return self.c_proj(self.act_fn(self.c_fc(x, route)), route)


def build_norm(config: MixLoraTextConfig) -> nn.Module:
    """The norm of the residual stream: RMSNorm, or LayerNorm where the config gives its epsilon."""
    if config.norm_epsilon is None:
        return RMSNorm(config.hidden_size, config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then MLP, each with its residual."""

    def __init__(self, config: MixLoraTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = RoutedAttention(config, layer_idx)
        self.mlp = RoutedMLP(config) if config.is_gated_act else RoutedPlainMLP(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        route: Route,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        kept: Kept | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`[batch, length, width]` -> the same shape. With checkpoints, transformers takes the cache away.

        Of packed tokens `[tokens, 1, width]` it gives the `kept` ones alone.
        """
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            route,
            position_embeddings,
            attention_mask=attention_mask,
            past_key_values=given_cache(past_key_values, cache),
            kept=kept,
            **kwargs,
        )
        if kept is not None:
            hidden_states, route = hidden_states.index_select(0, kept.places), kept.route
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states), route))


class RoutedPreTrainedModel(PreTrainedModel):
    """What every model here tells transformers."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache", "route"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": RoutedAttention}

    def _no_global_adapter(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "adapters act row by row here: pass adapter_ids (LongTensor [batch], -1 for the base) or change "
            "config.routing; add_adapter, load_adapter, save_adapter, delete_adapter and merge_adapter of "
            "MixLoraForConditionalGeneration add, read, write, remove and fold one in"
        )

    set_adapter = disable_adapters = enable_adapters = active_adapters = enable_peft_hotswap = _no_global_adapter
    add_adapter = load_adapter = delete_adapter = get_adapter_state_dict = _no_global_adapter

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            module.reset_buffers(module.inv_freq.device)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LoraDown | LoraUp):
            module.reset_parameters()
        elif isinstance(module, LoraExperts):
            module.reset()


class RoutedDecoder(RoutedPreTrainedModel):
    """Embedding, layers and the last norm. Masks and positions are the caller's."""

    config_class = MixLoraTextConfig

    def __init__(self, config: MixLoraTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def projections(self) -> dict[str, RoutedLinear]:
        """Every projection by its path, such as `layers.0.self_attn.q_proj`."""
        return {path: module for path, module in self.named_modules() if isinstance(module, RoutedLinear)}

    @capture_outputs  # here, not on a model with towers: it would hook into their layers too, which record their own
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        route: Route,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        row_lengths: torch.Tensor | None = None,
        layout: RowLayout | None = None,
        probe: Probe | None = None,
        packings: Sequence[Packing] = (),
        wanted: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`inputs_embeds` `[batch, length, width]` -> normed `last_hidden_state` of the same shape.

        Args:
            layout: where rows lie, if some are attended to as [`LongAttention`] does; no mask is needed then.
            probe: sees what each head attends to.
            packings: of all rows together; computes all layers without padding. What comes out has zeros there.
            wanted: BoolTensor `[batch, length]`, tokens that are looked at; with packings others may be zeros as well.
        """
        if layout is None:
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids, row_lengths)
        else:
            long_attention = LongAttention.make(
                self.config, layout, self.rotary_emb, inputs_embeds, row_lengths, probe
            )
            position_embeddings = long_attention.rotations.intra
            kwargs["long_attention"] = long_attention
        hidden_states = self.dropout(inputs_embeds)
        kwargs |= {"position_ids": position_ids, CACHE: past_key_values}
        if not packings:
            for layer in self.layers:
                hidden_states = layer(
                    hidden_states, route, position_embeddings, attention_mask=attention_mask, **kwargs
                )
            hidden_states = self.norm(hidden_states)
        else:
            kept = [packing.kept(wanted, route) for packing in packings]
            places = [packing if few is None else few.packing for packing, few in zip(packings, kept, strict=True)]
            states = [
                self._packed(hidden_states, route, position_embeddings, packing, few, **kwargs)
                for packing, few in zip(packings, kept, strict=True)
            ]
            hidden_states = unpack_all(places, states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: past_key_values})

    def _packed(
        self,
        hidden_states: torch.Tensor,
        route: Route,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packing: Packing,
        kept: Kept | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """All layers over the packed tokens of `hidden_states` `[batch, length, width]`: `[tokens, 1, width]`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and packing.learns):
            states, route = packing.pack(hidden_states), packing.route(route)
            cos, sin = position_embeddings
            position_embeddings = packing.pack(cos), packing.pack(sin)
            for layer in self.layers:
                last = layer is self.layers[-1]
                states = layer(
                    states, route, position_embeddings, packing=packing, kept=kept if last else None, **kwargs
                )
            return self.norm(states)
