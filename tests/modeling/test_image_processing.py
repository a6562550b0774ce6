"""Pictures that are easily misread: deep pixels, odd modes, tensors, broken files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mixlora.modeling.image_processing_mixlora import MixLoraImageProcessor, load_picture
from mixlora.modeling.image_processing_phi4 import Phi4ImageProcessor


def red(source) -> np.ndarray:
    return np.asarray(load_picture(source))[..., 0]


def test_a_dark_16_bit_picture_stays_dark():
    levels = np.array([[0, 100, 257, 514]], dtype=np.uint16)  # none over 255 * 257, some below 256
    assert red(levels).tolist() == [[0, 0, 1, 2]]
    assert red(Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint16))).tolist() == [[0, 0, 1]]


def test_mode_i_holds_8_or_16_bits():
    grey = np.array([[0, 128, 255]], dtype=np.int32)
    assert red(Image.fromarray(grey)).tolist() == grey.tolist()
    assert red(Image.fromarray(grey * 257)).tolist() == grey.tolist()


def test_float_pictures_and_overshoot():
    assert red(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))).tolist() == [[0, 128, 255]]
    assert red(np.array([[-1e-4, 1 + 1e-4]])).tolist() == [[0, 255]]
    assert red(torch.ones(3, 2, 2, dtype=torch.bfloat16, requires_grad=True)).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_every_mode_becomes_rgb(mode):
    picture = load_picture(Image.new(mode, (3, 2)))
    assert picture.mode == "RGB" and picture.size == (3, 2)


def test_a_transparent_palette_lies_on_white():
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([9, 9, 9])
    picture.info["transparency"] = 0
    assert (red(picture) == 255).all()


def test_a_truncated_file_is_refused_whether_opened_or_not():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png")
    half = file.getvalue()[:1500]
    for source in (half, Image.open(io.BytesIO(half))):
        with pytest.raises(ValueError, match="row 2, picture 1: can't be read as a picture"):
            load_picture(source, "row 2, picture 1")


@pytest.mark.parametrize(
    "source, message",
    [
        (np.full((2, 2), 300), "integer pixels must be in 0..255"),
        (np.full((2, 2, 3), 255.0), "float pixels must be finite and in 0..1"),
        (np.zeros((2, 2, 2)), "shape"),
        (np.zeros((2, 2, 2, 3)), "shape"),
        (np.array([["a"]]), "neither integers nor floats"),
        (Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "finite"),
        (Image.new("RGB", (0, 4)), "empty"),
        ("https://example.org/a.png", "not fetched"),
        ("no/such/file.png", "can't be read"),
    ],
)
def test_the_error_says_what_was_expected(source, message):
    with pytest.raises(ValueError, match=f"picture: .*{message}"):
        load_picture(source)


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        MixLoraImageProcessor()([])


def test_extreme_aspects_fit_and_the_rest_has_the_border_colour():
    processor = MixLoraImageProcessor(size=8, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    batch = processor([Image.new("RGB", (2000, 1), (255, 0, 0)), Image.new("RGB", (1, 1), (255, 0, 0))])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["image_sizes"].tolist() == [[1, 2000], [1, 1]]
    assert (batch["pixel_values"][:, 0] == 1).all() and (batch["pixel_values"][:, 1:] == 0).all()


def test_save_and_reload(tmp_path):
    MixLoraImageProcessor(size=16, image_std=[0.5, 0.25, 1.0]).save_pretrained(tmp_path)
    again = MixLoraImageProcessor.from_pretrained(tmp_path)
    assert again.size == 16 and again.image_std == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("processor", [MixLoraImageProcessor(size=8), Phi4ImageProcessor()], ids=["ours", "Phi-4's"])
@pytest.mark.parametrize("options", [{"do_rescale": False}, {"size": {"height": 4, "width": 4}}, {"dynamic_hd": 1}])
def test_settings_for_one_call_are_refused_not_ignored(processor, options):
    """Transformers' processor of Phi-4 pads a picture that is not rescaled with 509, in a scale of -1 to 1."""
    picture = np.zeros((9, 7, 3), np.uint8)
    with pytest.raises(ValueError, match=f"images: {next(iter(options))}=.* can't be set for one call"):
        processor(picture, **options)
    assert torch.equal(
        processor(picture, do_rescale=True, size=None)["pixel_values"], processor(picture)["pixel_values"]
    )
