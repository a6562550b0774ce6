"""Cases about transformers' pipelines, which take a checkpoint by its path. Models and processors are tiny."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from differences import Case
from PIL import Image
from transformers import (
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    pipeline,
)

from mixlora.modeling.chat_template import CHAT_TEMPLATE
from tests.modeling.model_fixtures import make_loud
from tests.modeling.phi4_fixtures import CROP, MELS, native_config
from tests.modeling.processor_fixtures import native_tokenizer
from tests.training.training_fixtures import make_phi4_start

SEEN = {"type": "image", "image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8))}
QUESTION = {"type": "text", "text": "?"}


def short() -> dict[str, Any]:
    """Options of a call; it writes into them."""
    generate = {"do_sample": False, "eos_token_id": None}
    return {"max_new_tokens": 4, "return_full_text": False, "generate_kwargs": generate}


def chat(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, QUESTION]}]


def their_processor() -> Phi4MultimodalProcessor:
    """Transformers', with a template that reads parts."""
    processor = Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(size={"height": CROP, "width": CROP}),
        Phi4MultimodalFeatureExtractor(feature_size=MELS),
        native_tokenizer(),
    )
    processor.chat_template = CHAT_TEMPLATE
    return processor


@cache
def place() -> TemporaryDirectory[str]:
    """Where both checkpoints lie, until Python ends."""
    return TemporaryDirectory()


@cache
def their_folder() -> str:
    processor, folder = their_processor(), f"{place().name}/theirs"
    config = native_config(vocab_size=len(processor.tokenizer))
    config.vision_config.image_token_id = processor.image_token_id
    config.audio_config.audio_token_id = processor.audio_token_id
    make_loud(Phi4MultimodalForCausalLM(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@cache
def our_folder() -> str:
    return make_phi4_start(Path(place().name) / "ours")


def answer(task: str, folder: str, part: dict[str, Any]) -> str:
    said = pipeline(task, model=folder)(text=chat(part), **short())
    return "answered" if said[0]["generated_text"] else "**nothing is said**"


def by_path(task: str) -> Case:
    return Case(
        f'`pipeline("{task}")` by path, a chat with a picture',
        "answered",
        lambda: answer(task, their_folder(), SEEN),
        lambda: answer(task, our_folder(), SEEN),
    )


CASES = [by_path("any-to-any"), by_path("image-text-to-text")]
