"""The small decoder of the study of long rows: its shape, how it reads, and how it begins."""

from dataclasses import dataclass
from typing import Any

import torch
from retrieval_media import Media, digit_scores
from retrieval_tasks import AUDIO, IMAGE, NUMBERS, PAD, VOCABULARY, Rows
from torch import nn

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.media_encoding import MediaOutput
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.rope import apply_rotary

METHODS = ("plain", "linear", "yarn", "longrope", "dual_chunk", "dual_chunk_temperature")
THETA = 10000.0
BACK, MARGIN = (1, 2), 8.0
"""How far the first heads look back, and how much all other scores are below."""
EMBEDDING = 0.7
SURENESS = 30.0
"""Logits of digits are so many times what least squares tells, about 0.9 for the digit shown and -0.1 for others."""
Parts = dict[str, dict[str, Media]]


@dataclass(frozen=True)
class Study:
    """The decoder's shape and the length of its training."""

    width: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    train_length: int = 1024


def method_config(study: Study, method: str, length: int) -> MixLoraConfig:
    """The config by which a trained decoder reads rows of `length` tokens.

    Raises:
        ValueError: the method is not one of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    trained = study.train_length
    factor = max(length / trained, 1.0)
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": study.width,
        "intermediate_size": study.width,
        "num_hidden_layers": study.layers,
        "num_attention_heads": study.heads,
        "head_dim": study.head_dim,
        "max_position_embeddings": trained,
        "attention_bias": True,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": THETA}
    if method in ("linear", "yarn") and factor > 1:
        rope |= {"rope_type": method, "factor": factor, "original_max_position_embeddings": trained}
    if method == "longrope" and factor > 1:  # slow frequencies stretched, fast ones left, as LongRoPE's search finds
        half = study.head_dim // 2
        long = [factor ** (i / max(half - 1, 1)) for i in range(half)]
        rope |= {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": long}
        rope |= {"factor": factor, "original_max_position_embeddings": trained}
    if method == "longrope":
        text["max_position_embeddings"] = length
    if method.startswith("dual_chunk"):
        sizes = {"chunk_size": trained, "local_size": trained // 8}
        text["long_context"] = {"method": "dual_chunk", "temperature": method.endswith("temperature"), **sizes}
    media = {"image_token_id": IMAGE, "audio_token_id": AUDIO, "tie_word_embeddings": False}
    routing = dict.fromkeys(("vision", "speech", "vision_speech"))
    return MixLoraConfig(text_config=text | {"rope_parameters": rope}, routing=routing, **media)


class Numbers(nn.Sequential):
    """Vectors of digits `[items, size]` to embeddings of the numbers they show, weighted by how surely they do."""

    def __init__(self, size: int, width: int):
        super().__init__(nn.Linear(size, 10, bias=False), nn.Softmax(-1), nn.Linear(10, width, bias=False))


class Reader(nn.Module):
    """The decoder, and a projector for what is seen and one for what is heard."""

    def __init__(self, study: Study, media: Parts, method: str = "plain", length: int = 1):
        super().__init__()
        self.model = MixLoraForConditionalGeneration(method_config(study, method, length))
        sizes = {task: parts["train"].vectors.shape[1] for task, parts in media.items()}
        self.projectors = nn.ModuleDict({task: Numbers(size, study.width) for task, size in sizes.items()})

    def forward(self, ids: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states `[rows, length, width]`.

        Args:
            ids: `[rows, length]`.
            vectors: `[items, size]` of all pictures, and of all clips, in order of appearance.
        """
        kinds = {"picture": "image", "speech": "audio"}
        shown = {
            kinds[task]: MediaOutput(pooler_output=[self.projectors[task](each)]) for task, each in vectors.items()
        }
        return self.model.model(ids, mm_encoder_outputs=shown or None, use_cache=False).last_hidden_state

    def read(self, ids: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of rows without digits, and scores of some tokens with all keys in the last layer.

        Args:
            ids: `[rows, length]`.
            places: `[rows, some]`.

        Returns:
            `[rows, length, width]`; `[rows, heads, some, length]`, later keys too.
        """
        decoder, kept = self.model.model.language_model, {}
        attention: Any = decoder.layers[-1].self_attn
        hooks = [
            getattr(attention, name).register_forward_hook(lambda *call, name=name: kept.update({name: call[2]}))
            for name in ("q_proj", "k_proj")
        ]
        hidden = self(ids, {})
        for hook in hooks:
            hook.remove()
        turn = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        query, key = (
            apply_rotary(kept[name].unflatten(2, (-1, attention.head_dim)).transpose(1, 2), *turn)
            for name in ("q_proj", "k_proj")
        )
        some = query.gather(2, places[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        return hidden, some @ key.transpose(2, 3) * attention.scaling

    @torch.no_grad()
    def begin(self) -> None:
        """Embeddings as large as what layers add, and two heads of the first layer that look one and two tokens back.

        Biases of q and k that are a rotation by so many positions apart do so. A decoder of this size finds such heads
        by itself, but in many more steps than all the rest takes.
        """
        nn.init.normal_(self.model.model.language_model.embed_tokens.weight, std=EMBEDDING)
        attention: Any = self.model.model.language_model.layers[0].self_attn
        half = attention.head_dim // 2
        angles = THETA ** (-torch.arange(half) / half)
        for head, back in enumerate(BACK):
            scores = (torch.arange(1, 1024)[:, None] * angles).cos().sum(1)  # by how far a key is from the one wanted
            strength = (MARGIN / float(half - scores.max()) / attention.scaling) ** 0.5
            mine = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            turned = torch.cat(((back * angles).cos(), -(back * angles).sin()))
            attention.q_proj.base_layer.weight[mine] = 0.0  # what stands there says nothing, only how far it is
            attention.k_proj.base_layer.weight[mine] = 0.0
            attention.q_proj.base_layer.bias[mine] = strength * turned
            attention.k_proj.base_layer.bias[mine] = strength * torch.cat((torch.ones(half), torch.zeros(half)))

    @torch.no_grad()
    def learn_digits(self, media: Parts) -> None:
        """Each projector learns by least squares which digit a vector shows, and gives the embedding of its number."""
        embeddings = self.model.model.language_model.embed_tokens.weight[NUMBERS.start : NUMBERS.start + 10]
        for task, parts in media.items():
            scores, _, numbers = self.projectors[task]
            scores.weight.copy_(SURENESS * digit_scores(parts["train"]).T)
            numbers.weight.copy_(embeddings.T)


def drawn(rows: Rows, name: str, media: Parts, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The vectors of the digits of a task's rows, of those to test with; see [`Reader`]."""
    if rows.digits is None:
        return {}
    return {name: media[name]["test"].draw(rows.digits, generator).flatten(0, 1)}
