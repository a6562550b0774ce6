"""Configuration of the decoder, the towers' projectors, the adapters and the routing table."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .long_context_config import check_long_context, check_sparse_prefill
from .phi4_config import from_phi4

MODALITIES = ("text", "vision", "speech", "vision_speech")
PHI4_ROUTING = {"text": None, "vision": "vision", "speech": "speech", "vision_speech": "vision"}
ADAPTER_FIELDS = {"r", "alpha", "dropout", "target_modules", "rank_pattern", "alpha_pattern", "experts", "top_k"}
ROPE_MODES = ("by_length", "fixed_long")
FOR_LONG_ROWS = ("long_context", "sparse_prefill")


def full_adapter(spec: dict[str, Any]) -> dict[str, Any]:
    """An entry of `MixLoraConfig.adapters` with its defaults."""
    return {"alpha": spec.get("r"), "dropout": 0.0, "target_modules": None} | spec


def check_adapter(name: str, spec: dict[str, Any]) -> None:
    """Raises ValueError for a wrong name or entry of `MixLoraConfig.adapters`."""
    if "." in name or not name:
        raise ValueError(f"adapter name {name!r} must be non-empty and without dots")
    if wrong := set(spec) - ADAPTER_FIELDS:
        raise ValueError(f"adapters[{name!r}]: unknown {sorted(wrong)}, expected {sorted(ADAPTER_FIELDS)}")
    for rank in (spec.get("r"), *(spec.get("rank_pattern") or {}).values()):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"adapters[{name!r}]: r must be an integer above 0, got {rank!r}")
    if "experts" in spec or "top_k" in spec:
        check_experts(spec.get("experts"), spec.get("top_k"), f"adapters[{name!r}]")


def check_experts(experts: Any, top_k: Any, where: str) -> None:
    """Raises ValueError unless there are at least two experts, of which a token can take `top_k`."""
    if not isinstance(experts, int) or not isinstance(top_k, int) or experts < 2 or not 1 <= top_k <= experts:
        raise ValueError(
            f"{where}: experts must be an integer above 1, and top_k one from 1 to experts, "
            f"got {experts!r} and {top_k!r}"
        )


SPEECH_CONTEXT = {"layers": 4, "kernel_size": 7, "intermediate_size": 512, "dropout": 0.0, "stride": 1}
"""Entries of `config.speech_context`, and what they are by default."""


def with_defaults(field: str, given: dict[str, Any], usual: dict[str, Any], counts: tuple[str, ...]) -> dict[str, Any]:
    """Entries of a field of the config, those that are not given as usual.

    Raises:
        ValueError: an unknown entry, one of `counts` that is no integer of at least 1, or a wrong `dropout`.
    """
    if unknown := sorted(set(given) - set(usual)):
        raise ValueError(f"{field}: unknown {', '.join(unknown)}, expected some of {', '.join(usual)}")
    full = copy.deepcopy(usual) | given
    for name in counts:
        if not isinstance(full[name], int) or full[name] < 1:
            raise ValueError(f"{field}: {name} must be an integer of at least 1, got {full[name]!r}")
    if not 0 <= full.get("dropout", 0) < 1:
        raise ValueError(f"{field}: dropout must be from 0 to below 1, got {full['dropout']!r}")
    return full


def full_context(given: dict[str, Any]) -> dict[str, Any]:
    """`config.speech_context` with its defaults; ValueError for a wrong entry."""
    full = with_defaults(
        "speech_context", given, SPEECH_CONTEXT, ("layers", "kernel_size", "intermediate_size", "stride")
    )
    if full["kernel_size"] % 2 == 0:
        raise ValueError(f"speech_context: kernel_size must be odd, got {full['kernel_size']}")
    return full


SPEECH_LETTERS: dict[str, Any] = {"alphabet": " 'abcdefghijklmnopqrstuvwxyz0123456789", "longest": 16, "words": 0}
"""Entries of `config.speech_letters`, and what they are by default."""


def check_alphabet(field: str, alphabet: Any) -> None:
    """Raises ValueError for an alphabet that CTC can't read."""
    if not isinstance(alphabet, str) or not 0 < len(alphabet) == len(set(alphabet)) < 256:
        raise ValueError(f"{field}: alphabet must be a string of 1 to 255 different letters, got {alphabet!r}")


def check_counts(field: str, **lists: Any) -> None:
    """Raises ValueError for what is no list of integers of at least 1."""
    for name, counts in lists.items():
        if not isinstance(counts, list) or not counts or not all(isinstance(n, int) and n >= 1 for n in counts):
            raise ValueError(f"{field}: {name} must be a list of integers of at least 1, got {counts!r}")


def full_letters(given: dict[str, Any]) -> dict[str, Any]:
    """`config.speech_letters` with its defaults; ValueError for a wrong entry."""
    full = with_defaults("speech_letters", given, SPEECH_LETTERS, ("longest",))
    check_alphabet("speech_letters", full["alphabet"])
    if type(full["words"]) is not int or full["words"] < 0:
        raise ValueError(f"speech_letters: words must be an integer of at least 0, got {full['words']!r}")
    return full


VISION_DETAIL: dict[str, Any] = {"widths": [16, 32, 64], "layers": 1, "patch_size": 4, "cells": 2}
"""Entries of `config.vision_detail`, and what they are by default."""


def full_detail(given: dict[str, Any]) -> dict[str, Any]:
    """`config.vision_detail` with its defaults; ValueError for a wrong entry."""
    full = with_defaults("vision_detail", given, VISION_DETAIL, ("layers", "patch_size", "cells"))
    check_counts("vision_detail", widths=full["widths"])
    return full


VISION_LETTERS: dict[str, Any] = {
    **{"alphabet": " 'abcdefghijklmnopqrstuvwxyz0123456789\n", "longest": 16, "lines": 3, "tokens": 16},
    **{"widths": [32, 64, 128], "layers": [1, 2, 3], "patch_size": 4},
}
"""Entries of `config.vision_letters`, and what they are by default."""


def full_reading(given: dict[str, Any]) -> dict[str, Any]:
    """`config.vision_letters` with its defaults; ValueError for a wrong entry."""
    full = with_defaults("vision_letters", given, VISION_LETTERS, ("longest", "lines", "tokens", "patch_size"))
    check_alphabet("vision_letters", full["alphabet"])
    check_counts("vision_letters", widths=full["widths"], layers=full["layers"])
    if "\n" not in full["alphabet"] or " " not in full["alphabet"]:
        raise ValueError(f"vision_letters: alphabet needs a space and a line break, got {full['alphabet']!r}")
    if len(full["widths"]) != len(full["layers"]):
        raise ValueError(
            f"vision_letters: widths and layers are of each stage, got {full['widths']} and {full['layers']}"
        )
    return full


VISION_NAMES: dict[str, Any] = {"count": 2000, "longest": 8, "hidden_size": 192, "dropout": 0.0}
"""Entries of `config.vision_names`, and what they are by default."""


@strict
class MixLoraTextConfig(PreTrainedConfig):
    """Decoder-only transformer: grouped-query attention, pre-norm, a gated or plain MLP, rotary positions.

    The field names are those of `LlamaConfig`. On top of them:

    Args:
        fused_projections: one `qkv_proj` and one `gate_up_proj` (Phi-3, Phi-4) in place of the split ones.
        attention_bias: bias of the q, k and v projections (Qwen2).
        attention_output_bias: bias of the output projection.
        qk_norm: RMSNorm over each head of q and k (Qwen3).
        rope_mode: `by_length`, LongRoPE's factors follow each row's length; or `fixed_long`, the long ones at every
            length, as vLLM serves a model whose context is longer than the one it was first trained on.
        is_gated_act: whether the MLP is gated, else it is `c_proj(act(c_fc(x)))` (StarCoder2).
        norm_epsilon: where given, norms are LayerNorms with a bias and this epsilon, not RMSNorms (StarCoder2).
        sliding_window: a token sees the last tokens of this number, itself among them; None for all.
        residual_dropout: dropout of what attention and MLP add, in training (StarCoder2, Phi-3).
        embedding_dropout: dropout of the input embeddings, in training (StarCoder2).
        long_context: `{"method": "dual_chunk", "chunk_size", "local_size", "temperature"}` for rows longer than those
            of training (see [`DualChunk`]); None for none.
        sparse_prefill: `{"min_length", "budgets", ...}` for prompts of which each head reads a part only (see
            [`SparsePrefill`]); None for dense ones.
    """

    model_type = "mixlora_decoder"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    rope_mode: str = "by_length"
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    fused_projections: bool = False
    qk_norm: bool = False
    is_gated_act: bool = True
    norm_epsilon: float | None = None
    sliding_window: int | None = None
    residual_dropout: int | float = 0.0
    embedding_dropout: int | float = 0.0
    long_context: dict[str, Any] | None = None
    sparse_prefill: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises ValueError where the heads do not divide, or rotary settings do not go together."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope_mode not in ROPE_MODES:
            raise ValueError(f"rope_mode {self.rope_mode!r} is not one of {ROPE_MODES}")
        kind = (self.rope_parameters or {}).get("rope_type")
        if self.rope_mode == "fixed_long" and kind != "longrope":
            raise ValueError(f"rope_mode 'fixed_long' needs the rope_type 'longrope', got {kind!r}")
        if self.sliding_window is not None and kind in ("longrope", "dynamic"):
            raise ValueError(f"sliding_window ({self.sliding_window}) with rope_type {kind!r} is not supported")
        if self.long_context is not None:
            self.long_context = check_long_context(self.long_context, kind, self.sliding_window)
        if self.sparse_prefill is not None:
            sizes = (self.num_hidden_layers, self.num_attention_heads)
            self.sparse_prefill = check_sparse_prefill(self.sparse_prefill, *sizes, self.sliding_window)


@strict
class MixLoraConfig(PreTrainedConfig):
    """A frozen decoder with a vision tower, a speech tower, and one LoRA adapter a route.

    `from_pretrained` and `from_dict` also read both layouts of Phi-4-Multimodal's config (model types `phi4mm` and
    `phi4_multimodal`).

    Args:
        text_config: the decoder, a [`MixLoraTextConfig`].
        vision_config: any transformers vision encoder (`timm_wrapper` included), or None.
        speech_config: any transformers audio encoder (Whisper's included), or None.
        adapters: name -> `{"r", "alpha", "dropout", "target_modules"}`; alpha is r by default, and `target_modules`
            lists names of projections, or paths where only some layers have it (`layers.0.self_attn.q_proj`), all of
            them by default. `rank_pattern` and `alpha_pattern` map names or paths to what differs there. With
            `experts` and `top_k` it holds so many pairs at each projection, and a router picks `top_k` for each token.
        routing: modality of a row (text, vision, speech, vision_speech) -> adapter name, or None for the base alone;
            Phi-4-Multimodal's table by default. A row whose adapter is not loaded raises.
        image_token_id: placeholder that a picture's features replace, one placeholder a feature.
        audio_token_id: the same for clips.
        vision_layers: feature layers of the vision tower whose outputs are joined, the deepest one last.
            Stage indices for `timm_wrapper`, indices into `hidden_states` otherwise.
        vision_tokens_per_side: a crop gives this number squared of tokens.
        vision_feature_size: width of the joined features. Taken from the tower where it tells.
        speech_stack: neighbouring encoder frames joined into one token.
        speech_blank_token_id: where given, a clip without a picture becomes what CTC hears in it, as embeddings of the
            decoder, and this token stands for silence (see `compress_by_ctc`); by default clips stay as projected.
        speech_ctc_weight: share of what CTC hears in the choice of each token of an answer to a clip, in `generate`,
            from 0 to below 1; for models that answer clips by what is said there. It needs `speech_blank_token_id`.
        speech_context: `{"layers", "kernel_size", "intermediate_size", "dropout", "stride"}` of convolution blocks
            that mix a clip's tokens before both speech projectors; `{}` takes the defaults, by default there are none.
            With a `stride` the blocks see tokens of `speech_stack / stride` frames, so many of which make one then.
        speech_letters: `{"alphabet", "longest", "words"}` of a head on those blocks' tokens that learns by CTC what a
            clip spells, beside its tokens; in `generate` CTC then chooses by letters. A token has at most `longest`.
            In `words` bytes a list of known words is kept, packed; at 0 any letters are a word. `{}` takes the
            defaults, by default there is none.
        vision_detail: `{"widths", "layers", "patch_size", "cells"}` of a small ConvNeXt that trains beside a frozen
            tower and is added to the projected tokens: stages of `widths`, each of `layers` blocks, the first on
            patches of `patch_size` pixels, the others half as fine as the one before; a token joins `cells` squared
            places of the last. `{}` takes the defaults, by default there is none. The tower sees square pictures.
        vision_letters: `{"alphabet", "longest", "lines", "tokens", "widths", "layers", "patch_size"}` of a small
            network that reads what is written in a picture, letter by letter and line by line, from the pixels. It
            learns by CTC. What it reads follows the picture's other tokens, as `tokens` embeddings of the decoder.
            Stages of `widths` have `layers` blocks; a column is `patch_size` pixels wide. It knows the words of
            `speech_letters`, where there are any. `{}` takes the defaults, by default there is none.
        vision_names: `{"count", "longest", "hidden_size", "dropout"}` of a classifier on the tower's features, with
            room for `count` names of `longest` tokens: see [`VisionNames.learn_names`]. A picture's name, or what fits
            of several, follows its tokens, as the decoder's embeddings. `{}` takes the defaults, by default there is
            none.
        vision_told_weight: probability that an answer about a picture is its name, as much that it is what is
            written there, and twice that it says by what is seen whether a thing is there; from 0 to below 0.5, before
            `generate` chooses the first token: see [`ToldGuide`].
        projector_hidden_size: width of the projectors' hidden layer; the decoder's width by default.
        projector_norm: whether the projectors begin with a LayerNorm.
        base_model: `{"name_or_path", "revision", "sha256"}` of the decoder, where the checkpoint does not hold it.
        long_context, sparse_prefill: given here, they are put into `text_config`.
        merged_adapter: name of the adapter that is folded into the decoder's weights, which are then no base any more;
            see [`MixLoraForConditionalGeneration.merge_adapter`].
        exact_base: whether rows of the base are what the decoder alone gives bit for bit. Without it prompts are read
            without their padding, and products go through the library that is quickest: rows then agree to rounding.
            Training does so in any case.
    """

    model_type = "mixlora"
    sub_configs_defaults = {
        "text_config": MixLoraTextConfig,
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="timm_wrapper", optional=True),
        "speech_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    adapters: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    vision_layers: list[int] | None = None
    vision_tokens_per_side: int = 7
    vision_feature_size: int | None = None
    speech_stack: int = 4
    speech_blank_token_id: int | None = None
    speech_ctc_weight: int | float = 0.0
    speech_context: dict[str, Any] | None = None
    speech_letters: dict[str, Any] | None = None
    vision_detail: dict[str, Any] | None = None
    vision_letters: dict[str, Any] | None = None
    vision_names: dict[str, Any] | None = None
    vision_told_weight: int | float = 0.0
    projector_hidden_size: int | None = None
    projector_norm: bool = True
    tie_word_embeddings: bool = True
    base_model: dict[str, Any] | None = None
    merged_adapter: str | None = None
    exact_base: bool = True

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = super().get_config_dict(*args, **kwargs)
        return from_phi4(config), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(from_phi4(config_dict), **kwargs)

    def __post_init__(self, **kwargs):
        self.adapters = {name: full_adapter(spec) for name, spec in (self.adapters or {}).items()}
        self.routing = PHI4_ROUTING | (self.routing or {})
        if self.vision_layers is None:
            self.vision_layers = [-1]
        if self.speech_context is not None:
            self.speech_context = full_context(self.speech_context)
        if self.speech_letters is not None:
            self.speech_letters = full_letters(self.speech_letters)
        if self.vision_detail is not None:
            self.vision_detail = full_detail(self.vision_detail)
        if self.vision_letters is not None:
            self.vision_letters = full_reading(self.vision_letters)
        if self.vision_names is not None:
            counts = ("count", "longest", "hidden_size")
            self.vision_names = with_defaults("vision_names", self.vision_names, VISION_NAMES, counts)
        for_long_rows = {name: kwargs.pop(name) for name in FOR_LONG_ROWS if name in kwargs}
        super().__post_init__(**kwargs)
        self.set_long_context(**for_long_rows)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    def set_long_context(self, **fields: Any) -> None:
        """Changes `long_context` or `sparse_prefill` of the decoder; raises ValueError for a wrong one."""
        for name, value in fields.items():
            setattr(self.text_config, name, value)
        if fields:
            self.text_config.validate_architecture()

    def validate_architecture(self):
        """Raises ValueError for an unknown modality, an adapter that is not there, or a wrong entry."""
        if not 0 <= self.speech_ctc_weight < 1 or (self.speech_ctc_weight and self.speech_blank_token_id is None):
            raise ValueError(
                f"speech_ctc_weight ({self.speech_ctc_weight}) goes from 0 to below 1, and above 0 with a "
                "speech_blank_token_id"
            )
        if not 0 <= self.vision_told_weight < 0.5:
            raise ValueError(f"vision_told_weight ({self.vision_told_weight}) goes from 0 to below 0.5")
        stride = (self.speech_context or SPEECH_CONTEXT)["stride"]
        if self.speech_stack % stride:
            raise ValueError(
                f"speech_stack ({self.speech_stack}) must be a multiple of the stride of speech_context ({stride})"
            )
        if self.speech_letters is not None and self.speech_context is None:
            raise ValueError("speech_letters reads the tokens of a speech_context, and there is none")
        for modality, name in self.routing.items():
            if modality not in MODALITIES:
                raise ValueError(f"routing: unknown modality {modality!r}, expected one of {MODALITIES}")
            if name is not None and not isinstance(name, str):
                raise ValueError(f"routing[{modality!r}] must be an adapter name or None, got {name!r}")
        for name, spec in self.adapters.items():
            check_adapter(name, spec)


@strict
class Phi4MMConfig(MixLoraConfig):
    """Lets the Auto classes read Microsoft's config, model type `phi4mm`: what they get is a [`MixLoraConfig`]."""

    model_type = "phi4mm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return MixLoraConfig.from_dict(config_dict, **kwargs)
