"""A tiny checkpoint with its processor, and rows of every kind with media that are drawn here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mixlora.modeling.audio_processing_phi4 import Phi4AudioProcessor
from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.image_processing_phi4 import Phi4ImageProcessor
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.phi4_config import PROJECTIONS
from mixlora.modeling.processing_phi4 import Phi4MMProcessor
from tests.modeling.model_fixtures import make_loud, tiny_model
from tests.modeling.phi4_fixtures import CROP, MELS, RANKS, native_config
from tests.modeling.processor_fixtures import MICROSOFTS_TEMPLATE, microsofts_tokenizer, tiny_processor


def make_start(folder: Path, **changes: Any) -> str:
    """A checkpoint to start from; `changes` are those of `tiny_model`."""
    processor = tiny_processor()
    model = tiny_model(**changes)
    model.config.image_token_id, model.config.audio_token_id = processor.image_token_id, processor.audio_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def chat(kinds: str, answer: str, index: int = 0) -> dict[str, Any]:
    """A conversation about `i` pictures and `a` clips, in the order of `kinds`."""
    media = {"i": ("image", "png"), "a": ("audio", "wav")}
    parts = [{"type": media[kind][0], "path": f"{index}.{media[kind][1]}"} for kind in kinds]
    parts.append({"type": "text", "text": "?" * (1 + index % 3)})
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def write_rows(folder: Path, rows: int = 12, size: tuple[int, int] = (6, 9)) -> Path:
    """Rows of text, picture, clip, and both, with their media; pictures of `size`, height and width."""
    generator = np.random.default_rng(0)
    lines: list[dict[str, Any]] = [{"text": "the quick brown fox jumps over the lazy dog. " * 3}]
    for i in range(rows):
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        soundfile.write(folder / f"{i}.wav", generator.normal(0, 0.1, 2000 + 700 * i), 16000)
        lines.append(chat(("", "i", "a", "ia")[i % 4], "yes" if i % 2 else "no way", i))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def write_recipe(folder: Path, start: str, data: Path, train: list[str], **changes: Any) -> Path:
    """A recipe of one stage."""
    stage: dict[str, Any] = {"name": "only", "train": train, "data": [{"path": str(data)}], "learning_rate": 1e-2}
    stage |= {"max_steps": 6, "tokens_per_batch": 256, "logging_steps": 1, "save_steps": 2} | changes
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": start, "seed": 1, "stages": [stage]}))  # JSON is YAML
    return path


def make_phi4_start(folder: Path) -> str:
    """A checkpoint with Phi-4-Multimodal's towers, its processor and Microsoft's template; crops of 56 pixels."""
    torch.manual_seed(0)
    processor = Phi4MMProcessor(
        Phi4ImageProcessor(size=CROP, dynamic_hd=4),
        Phi4AudioProcessor(feature_size=MELS),
        microsofts_tokenizer(),
        chat_template=MICROSOFTS_TEMPLATE,
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    config = MixLoraConfig.from_dict(native_config(vocab_size=len(processor.tokenizer), eos_token_id=[end]).to_dict())
    config.image_token_id, config.audio_token_id = processor.image_token_id, processor.audio_token_id
    config.adapters = {
        name: {"r": rank, "alpha": alpha, "dropout": 0.0, "target_modules": list(PROJECTIONS)}
        for name, (rank, alpha, _) in RANKS.items()
    }
    make_loud(MixLoraForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
