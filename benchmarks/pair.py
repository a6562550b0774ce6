"""Our model and transformers' Phi4Multimodal with PEFT's adapters: the same weights, and the same rows for both."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import Phi4MultimodalConfig, Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM
from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import Phi4MultimodalImageProcessor

from benchmarks.shapes import Rows, Shapes
from mixlora.modeling.audio_processing_phi4 import Phi4AudioProcessor
from mixlora.modeling.image_processing_phi4 import Phi4ImageProcessor
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration

TARGETS = r".*\.layers\.\d+\.((self_attn\.(qkv|o)_proj)|(mlp\.(gate_up|down)_proj))"
"""As released; PEFT matches it against whole paths."""
MODALITIES = ("text", "image", "speech")
ADAPTERS = {"text": None, "image": "vision", "speech": "speech"}
PAD = 0


def peer_config(shapes: Shapes) -> Phi4MultimodalConfig:
    """transformers' config of these shapes, positions and towers as released but for their size."""
    size, inner, layers, heads = shapes.tower
    vision = {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": shapes.crop,
        "crop_size": shapes.crop,
        "image_token_id": shapes.image_id,
    }
    size, inner, blocks, heads = shapes.conformer
    audio = {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_blocks": blocks,
        "num_attention_heads": heads,
        "ext_pw_out_channel": size,
        "depthwise_separable_out_channel": size,
        "nemo_conv_channels": size,
        "bias_max_distance": 500,
        "audio_token_id": shapes.audio_id,
    }
    pairs = int(0.75 * shapes.width // shapes.heads) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * pairs,
        "long_factor": np.geomspace(1, 48, pairs).tolist(),
        "original_max_position_embeddings": 4096,
    }
    return Phi4MultimodalConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.width,
        intermediate_size=shapes.inner,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.key_value_heads,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=rope,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=None,
        sliding_window=None,
        vision_config=vision,
        audio_config=audio,
    )


@dataclass
class Pair:
    """Both models in `eval`, and what made them."""

    shapes: Shapes
    ours: Any
    peer: Any
    device: str

    @contextmanager
    def acting(self, modality: str) -> Iterator[Any]:
        """The peer with the adapter of one modality acting on all rows: all that transformers with PEFT offers."""
        adapter = ADAPTERS[modality]
        if adapter is not None:
            self.peer.set_adapter(adapter)
        with self.peer.disable_adapter() if adapter is None else nullcontext():
            yield self.peer


def build_pair(shapes: Shapes, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> Pair:
    """Draws the peer's weights and loads them into ours through a checkpoint in transformers' layout."""
    torch.manual_seed(seed)
    base = Phi4MultimodalForCausalLM(peer_config(shapes)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder)
        peer: PeftModel | None = None
        for adapter, rank in shapes.ranks:
            dropout = 0.01 if adapter == "speech" else 0.0
            config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=TARGETS)
            if peer is None:
                peer = get_peft_model(base, config, adapter_name=adapter)
            else:
                peer.add_adapter(adapter, config)
        assert peer is not None
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for path, parameter in peer.named_parameters():
                if ".lora_" in path:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator) * 0.5 / parameter.shape[1] ** 0.5
                    )
        peer.save_pretrained(folder)
        for adapter, _ in shapes.ranks:
            (folder / adapter).rename(folder / f"{adapter}-lora")
        ours = MixLoraForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    ours.config.exact_base = False
    for model in (ours, base):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
    return Pair(shapes, ours.eval().to(device), peer.eval().to(device, getattr(torch, dtype)), device)


@dataclass
class Row:
    """A row of ids `[length]` with its picture or clip."""

    modality: str
    ids: torch.Tensor
    picture: Image.Image | None = None
    clip: np.ndarray | None = None


class Feeder:
    """Makes rows, and of rows the inputs of either model by its own processors."""

    def __init__(self, shapes: Shapes, device: str = "cpu", dtype: str = "float32"):
        self.shapes, self.device, self.dtype = shapes, device, getattr(torch, dtype)
        side = {"height": shapes.crop, "width": shapes.crop}
        self.pictures, self.clips = Phi4ImageProcessor(size=shapes.crop), Phi4AudioProcessor()
        self.peer_pictures = Phi4MultimodalImageProcessor(size=side)
        self.peer_clips = Phi4MultimodalFeatureExtractor()

    def picture(self, size: tuple[int, int], seed: int) -> Image.Image:
        """A picture of `size` (height, width): noise, smooth enough to be like a photograph."""
        coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8)
        return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)

    def clip(self, seconds: float, seed: int) -> np.ndarray:
        """Noise of a voice's loudness, 16 kHz."""
        noise = np.random.default_rng(seed).standard_normal(round(16000 * seconds))
        return (0.1 * noise).astype(np.float32)

    def rows(self, rows: Rows, seed: int = 0, label_tokens: int = 0) -> list[Row]:
        """Text rows, then image rows, then speech rows; each longer by `label_tokens` at its end."""
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> torch.Tensor:
            return torch.randint(1, self.shapes.vocabulary - 60, (count,), generator=generator)

        made = [Row("text", words(count + label_tokens)) for count in rows.text]
        for i, size in enumerate(rows.pictures):
            picture = self.picture(size, seed + i)
            count = int(self.pictures([picture])["num_img_tokens"][0])
            ids = torch.cat([torch.full((count,), self.shapes.image_id), words(rows.question + label_tokens)])
            made.append(Row("image", ids, picture=picture))
        for i, seconds in enumerate(rows.clips):
            clip = self.clip(seconds, seed + i)
            count = -(-self.clips.real_frames(len(clip)) // 8)
            ids = torch.cat([torch.full((count,), self.shapes.audio_id), words(rows.question + label_tokens)])
            made.append(Row("speech", ids, clip=clip))
        return made

    def _padded(self, rows: list[Row], side: str) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row.ids for row in rows], batch_first=True, padding_value=PAD, padding_side=side)
        mask = pad([torch.ones_like(row.ids) for row in rows], batch_first=True, padding_side=side)
        return {"input_ids": ids, "attention_mask": mask}

    def _placed(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def ours(self, rows: list[Row], side: str = "left") -> dict[str, torch.Tensor]:
        """Any rows together."""
        inputs: dict[str, Any] = self._padded(rows, side)
        if pictures := [row.picture for row in rows if row.picture is not None]:
            inputs |= {k: v for k, v in self.pictures(pictures).items() if k != "num_img_tokens"}
        if clips := [row.clip for row in rows if row.clip is not None]:
            inputs |= dict(self.clips(clips, sampling_rate=16000))
        return self._placed(inputs)

    def peer(self, rows: list[Row], side: str = "left") -> dict[str, torch.Tensor]:
        """The same for transformers; of one modality, since one adapter acts on all."""
        inputs: dict[str, Any] = self._padded(rows, side)
        if pictures := [row.picture for row in rows if row.picture is not None]:
            made = self.peer_pictures(pictures, return_tensors="pt")
            inputs |= {k: v for k, v in made.items() if k != "num_img_tokens"}
        if clips := [row.clip for row in rows if row.clip is not None]:
            inputs |= dict(self.peer_clips(clips, sampling_rate=16000, return_tensors="pt"))
        return self._placed(inputs)

    def peer_calls(self, rows: list[Row], side: str = "left") -> dict[str, dict[str, torch.Tensor]]:
        """The peer's inputs, one call for each modality."""
        return {
            modality: self.peer(mine, side)
            for modality in MODALITIES
            if (mine := [row for row in rows if row.modality == modality])
        }


def check_agreement(pair: Pair, feeder: Feeder, rows: list[Row]) -> float:
    """The largest difference of last logits, in standard deviations: ours in one batch, the peer's row by row.

    Row by row the peer is right, but where no patch of a picture is masked: its tower then looks one way only.

    Raises:
        RuntimeError: they differ.
    """
    with torch.no_grad():
        found = pair.ours(**feeder.ours(rows), logits_to_keep=1).logits[:, -1].float()
        wanted = []
        for row in rows:
            with pair.acting(row.modality) as peer:
                wanted.append(peer(**feeder.peer([row]), logits_to_keep=1).logits[0, -1].float())
    apart = ((found - torch.stack(wanted)).abs().amax(-1) / torch.stack(wanted).std(-1)).max().item()
    most = 5e-3 if feeder.dtype == torch.float32 else 0.3
    if apart > most:
        raise RuntimeError(f"the answers differ by {apart:.3g} standard deviations, more than {most}")
    return apart
