"""A small branch beside the vision tower, added to the projected tokens."""

import pytest
import torch

from mixlora import MixLoraConfig, MixLoraForConditionalGeneration
from mixlora.modeling.vision_detail import VisionDetail
from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_config, tiny_model
from tests.modeling.phi4_fixtures import native_config

SIZES = {"widths": [4, 6], "layers": 1, "patch_size": 2, "cells": 1}  # 2 x 2 tokens of 8 x 8 pixels


@torch.no_grad()
def test_a_fresh_branch_leaves_pictures_as_they_were() -> None:
    torch.manual_seed(0)
    fresh = MixLoraForConditionalGeneration(tiny_config(vision_detail=SIZES)).eval()
    plain = MixLoraForConditionalGeneration(tiny_config()).eval()
    weights = {name: value for name, value in fresh.state_dict().items() if "vision_detail" not in name}
    plain.load_state_dict(weights)
    row = batch_inputs([row_inputs("image")])
    assert torch.equal(fresh(**row).logits, plain(**row).logits)
    fresh.model.vision_detail.head.weight.normal_()
    assert not torch.allclose(fresh(**row).logits, plain(**row).logits, atol=1e-3)


@torch.no_grad()
def test_a_token_is_told_of_by_its_own_place() -> None:
    torch.manual_seed(0)
    detail = VisionDetail(2, 5, **SIZES | {"widths": [4]} | {"patch_size": 4})  # nothing reaches beyond a kernel of 7
    detail.head.weight.normal_()
    pictures = torch.randn(3, 3, 8, 8)
    assert detail(pictures).shape == (3, 4, 5)
    torch.testing.assert_close(detail(pictures)[1:2], detail(pictures[1:2]))
    for block in detail.stages[0].blocks:
        block.conv_dw.weight[:, :, [0, 1, 2, 4, 5, 6]] = 0
        block.conv_dw.weight[:, :, :, [0, 1, 2, 4, 5, 6]] = 0
    changed = pictures.clone()
    changed[0, 0, 6, 1] += 1  # row 1, column 0 of the tokens
    assert (detail(changed) != detail(pictures)).any(-1)[0].tolist() == [False, False, True, False]


@torch.no_grad()
def test_tower_features_come_with_pixels() -> None:
    model = tiny_model(vision_detail=SIZES)
    row = batch_inputs([row_inputs("image")])
    features = model.model.encode_vision(row["pixel_values"])
    both = model(**row, mm_encoder_outputs={"image_features": features}).logits
    torch.testing.assert_close(both, model(**row).logits)
    alone = {name: value for name, value in row.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="vision_detail needs pixel_values beside the tower's features"):
        model(**alone, mm_encoder_outputs={"image_features": features})


def test_the_branch_is_a_group_and_learns_beside_a_frozen_tower() -> None:
    model = tiny_model(vision_detail=SIZES)
    names = model.parameter_groups()["vision_detail"]
    assert {name.split(".")[2] for name in names} == {"stem", "norm", "stages", "head"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    row = batch_inputs([row_inputs("image")])
    model.train()(**row).logits.square().mean().backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)
    assert not model.model.vision_tower.training and model.model.vision_detail.training


def test_it_is_saved_and_loaded(tmp_path) -> None:
    model = tiny_model(vision_detail=SIZES)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    row = batch_inputs([row_inputs("image")])
    assert again.config.vision_detail == SIZES
    assert torch.equal(again(**row).logits, model(**row).logits)


def test_pictures_of_another_size_are_refused() -> None:
    detail = VisionDetail(2, 5, **SIZES)
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 12\]: vision_detail takes pictures of 8 x 8 pixels"):
        detail(torch.zeros(1, 3, 8, 12))


def test_towers_that_cut_pictures_are_refused() -> None:
    config = MixLoraConfig.from_dict(native_config().to_dict())
    config.vision_detail = SIZES
    with pytest.raises(ValueError, match="vision_detail: phi4_multimodal_vision cuts pictures into crops"):
        MixLoraForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 2}, "unknown width, expected some of widths"),
        ({"widths": []}, r"widths must be a list of integers of at least 1, got \[\]"),
        ({"cells": 0}, "cells must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"vision_detail: {message}"):
        tiny_model(vision_detail=wrong)
