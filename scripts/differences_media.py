"""Cases about the processor's pictures and clips. The tokenizer is tiny; sizes are Phi-4-Multimodal's own."""

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from differences import Case, distance
from PIL import Image
from transformers import Phi4MultimodalImageProcessor

from mixlora.modeling.chat_template import CHAT_TEMPLATE
from mixlora.modeling.image_processing_phi4 import Phi4ImageProcessor
from mixlora.modeling.processing_phi4 import Phi4MMProcessor
from tests.modeling.processor_fixtures import native_processor, native_tokenizer

RATE = 16000
CLIP = (np.random.default_rng(0).standard_normal(8000) * 0.1).astype(np.float32)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 448, 3), dtype=np.uint8))
GREY = np.random.default_rng(1).integers(0, 255, (448, 448), dtype=np.uint8)
TURNED = 6  # EXIF: to be turned by 90 degrees


@cache
def theirs() -> Any:
    """Transformers' processor, with a template that reads parts."""
    processor = native_processor()
    processor.chat_template = CHAT_TEMPLATE
    return processor


@cache
def ours() -> Phi4MMProcessor:
    return Phi4MMProcessor(tokenizer=native_tokenizer())


def both(what: str, wanted: str, measure: Callable[[Any], str], vllm: str = "") -> Case:
    """A case that asks both processors the same."""
    return Case(what, wanted, lambda: measure(theirs()), lambda: measure(ours()), vllm)


def pixels(processor: Any, picture: Any) -> torch.Tensor:
    found = processor.image_processor(picture, return_tensors="pt")
    return found["pixel_values"] if "pixel_values" in found else found["image_pixel_values"][0]


def mels(processor: Any, clips: Any) -> torch.Tensor:
    found = processor.audio_processor(clips, sampling_rate=RATE, return_tensors="pt")
    return found["input_features"] if "input_features" in found else found["audio_input_features"]


def picture_as(processor: Any, plain: Any, other: Any) -> str:
    return distance(pixels(processor, other), pixels(processor, plain), 0.02, "-1 to 1")


def clip_as(processor: Any, other: Any) -> str:
    """Log-mel energies; 16 bits shift the quietest ones a little."""
    return distance(mels(processor, other), mels(processor, CLIP), 1.0, "log energies of 0 to 25")


def turned_picture(processor: Any) -> str:
    file, tall = io.BytesIO(), Image.new("RGB", (448, 896))
    exif = tall.getexif()
    exif[0x0112] = TURNED
    tall.save(file, "jpeg", exif=exif)
    height, width = processor.image_processor(Image.open(file), return_tensors="pt")["image_sizes"][0].tolist()
    return f"read as {width} x {height}" if (width, height) == (896, 448) else f"**not turned**: {width} x {height}"


def smaller_crops(image_processor: Any) -> str:
    """What the tower gives: `8 * 9` tokens of the global view, a separator, and those of the real patches."""
    found = image_processor(PICTURE, return_tensors="pt")
    mask = found["image_attention_mask"].reshape(-1, 16, 16)[1:, ::2, ::2]
    columns = int(found["image_sizes"][0, 1]) // 224
    height, width = (int(mask[::columns, :, 0].sum()), int(mask[:columns, 0].sum()))
    wanted, given = height * (width + 1) + 1 + 8 * 9, int(found["num_img_tokens"][0])
    return "as many as features" if given == wanted else f"**{given} placeholders for {wanted} features**"


def short_clip(processor: Any) -> str:
    found = processor.audio_processor([CLIP, CLIP[:300]], sampling_rate=RATE, return_tensors="pt")
    sizes = found.get("audio_embed_sizes")
    return f"**{int(sizes[1])} tokens**, no message" if sizes is not None else "accepted"


def not_a_number(processor: Any) -> str:
    clip = np.where(np.arange(len(CLIP)) == 9, np.nan, CLIP).astype(np.float32)
    return "features are finite" if mels(processor, clip).isfinite().all() else "**NaN features**, no message"


def not_rescaled(processor: Any) -> str:
    """A picture in 0..1 that is said to be so."""
    found = processor.image_processor(np.asarray(PICTURE, np.float32) / 255, do_rescale=False, return_tensors="pt")
    values = found["pixel_values"] if "pixel_values" in found else found["image_pixel_values"]
    return f"**padding of {float(values.max()):.0f}**, of -1 to 1" if values.max() > 1 else "the same"


def not_a_pixel(processor: Any) -> str:
    picture = np.asarray(PICTURE, np.float32) / 255
    picture[3, 5] = np.nan
    finite = pixels(processor, picture).isfinite().all()
    return "pixels are finite" if finite else "**NaN pixels**, no message"


def crops_of_two(processor: Any) -> str:
    """Pictures of a global view and 1 crop, and of a global view and 16."""
    pictures = [PICTURE.resize((448, 448)), PICTURE.resize((1792, 1792))]
    found = processor.image_processor(pictures, return_tensors="pt")
    views = found["pixel_values"] if "pixel_values" in found else found["image_pixel_values"].flatten(0, 1)
    return f"{len(views)} crops"


def other_rate(processor: Any) -> str:
    found = processor.audio_processor(CLIP, sampling_rate=8000, return_tensors="pt")
    frames = found["input_features"].shape[1] if "input_features" in found else found["audio_input_features"].shape[1]
    return f"resampled: {frames} frames of 10 ms"


CASES = [
    both(
        "a float picture in 0..1",
        "the pixels of the uint8 picture",
        lambda processor: picture_as(processor, PICTURE, np.asarray(PICTURE) / 255),
    ),
    both(
        "a 16-bit grey picture",
        "the pixels of the 8-bit picture",
        lambda p: picture_as(p, Image.fromarray(GREY), Image.fromarray(GREY.astype(np.uint16) * 257)),
    ),
    both("a float picture in 0..1, with `do_rescale=False`", "the same, or an error", not_rescaled),
    both("NaN in a float picture", "an error", not_a_pixel),
    both("a picture of 1 crop beside one of 16, each with its global view", "19 crops", crops_of_two),
    both("a picture that EXIF says to turn", "896 x 448", turned_picture),
    Case(
        "crops of 224 pixels",
        "as many placeholders as features",
        lambda: smaller_crops(Phi4MultimodalImageProcessor(size={"height": 224, "width": 224})),
        lambda: smaller_crops(Phi4ImageProcessor(size=224)),
        "sizes are fixed in the code",
    ),
    both("int16 samples", "the features of floats", lambda p: clip_as(p, (CLIP * 32768).astype(np.int16))),
    both("stereo, `[2, n]` in a list", "the features of mono", lambda p: clip_as(p, [np.stack([CLIP, CLIP])])),
    both("a clip at 8 kHz, with its rate", "resampled", other_rate, "resamples to 16 kHz"),
    both("a clip of 19 ms beside a longer one", "an error", short_clip),
    both("NaN in a clip", "an error", not_a_number),
]
