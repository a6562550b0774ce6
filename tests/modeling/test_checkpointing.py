"""Activation checkpointing, in towers too: layers run twice, gradients are the same."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from transformers import TimmWrapperConfig
from transformers.cache_utils import DynamicCache

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import ROWS, batch_inputs, make_loud, of_type, row_inputs, tiny_config
from tests.modeling.phi4_fixtures import make_row, native_config, our_inputs

Inputs = dict[str, torch.Tensor]


def whisper_and_clip() -> tuple[Any, Inputs]:
    return tiny_config(vision_layers=[-1]), batch_inputs([row_inputs(kind) for kind in ROWS])


def timm() -> tuple[Any, Inputs]:
    """EfficientNet at 32 pixels: one token a picture."""
    vision = TimmWrapperConfig(architecture="tf_efficientnet_lite0")
    config = tiny_config(vision_config=vision, vision_layers=[3, 4], vision_tokens_per_side=1)
    ids = torch.tensor([[10, 1, 11, 12], [13, 14, 1, 15]])
    return config, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}


def phi4() -> tuple[Any, Inputs]:
    """Both towers of Phi-4-Multimodal; its adapters are not loaded, so no row asks for one."""
    inputs = our_inputs([make_row(sizes=[(70, 130)]), make_row(frames=[61, 30])])
    return MixLoraConfig.from_dict(native_config().to_dict()), inputs | {"adapter_ids": torch.tensor([-1, -1])}


def count(calls: Counter[str], part: str, *hooked: Any) -> None:
    calls[part] += 1


@pytest.mark.parametrize("build", [whisper_and_clip, timm, phi4], ids=lambda build: build.__name__)
def test_towers_are_checkpointed_and_learn_the_same(build: Any) -> None:
    torch.manual_seed(0)
    config, inputs = build()
    runs = []
    for enabled in (False, True):
        model = make_loud(MixLoraForConditionalGeneration(config)).double().train()
        if enabled:
            model.activation_checkpointing_enable()
        calls: Counter[str] = Counter()
        for name, module in model.model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(partial(count, calls, name.split(".")[0]))
        torch.manual_seed(1)  # Phi-4's speech tower has dropout
        model(**of_type(inputs, torch.double), use_cache=False).logits.square().mean().backward()
        runs.append((calls, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, wanted), (twice, found) = runs
    for part in plain:
        if part == "language_model" or part.endswith("tower"):
            assert twice[part] > 1.5 * plain[part], part
    assert found.keys() == wanted.keys() and any("tower" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-9 * wanted[name].norm() + 1e-12, name


def test_checkpointing_can_be_switched_off_again() -> None:
    model = MixLoraForConditionalGeneration(timm()[0])
    net = model.model.vision_tower.encoder.timm_model
    model.activation_checkpointing_enable()
    assert net.grad_checkpointing
    model.activation_checkpointing_disable()
    assert not net.grad_checkpointing


def test_training_with_checkpoints_keeps_no_cache() -> None:
    model = make_loud(MixLoraForConditionalGeneration(tiny_config())).train()
    model.activation_checkpointing_enable()
    batch = batch_inputs([row_inputs("text")])
    assert model(**batch).past_key_values is None
    output = model(**batch, past_key_values=DynamicCache(), use_cache=True)
    output.logits.sum().backward()
    assert output.past_key_values is None or output.past_key_values.get_seq_length() == 0
