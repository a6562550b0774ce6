"""A decoder in int8 or int4 under adapters, projectors and towers in full precision."""

from typing import Any

import pytest
import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.routed_lora import RoutedLinear
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model

quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with the extra interop")

KINDS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(16)),
}
NEAR = {"int8": 0.3, "int4": 1.0}
"""Root mean square of what the logits differ by, in their standard deviations; that of unlike models is 1.4."""


LEFT = ["lm_head", r".*\.lora_[AB]", r"model\.(vision|speech)_.*"]
"""What a loader leaves as it is: all but the decoder's own projections."""


def is_base(module: torch.nn.Module, name: str) -> bool:
    return name.endswith(".base_layer")


def quantized(kind: str) -> MixLoraForConditionalGeneration:
    model = tiny_model().requires_grad_(False)
    quantization.quantize_(model, KINDS[kind](), filter_fn=is_base)
    return model


def not_base(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".base_layer." not in name}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found - wanted).pow(2).mean().sqrt() / wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_base_is_quantized_and_logits_are_near(kind: str) -> None:
    whole, model = tiny_model(), quantized(kind)
    weights = [module.base_layer.weight for module in model.modules() if isinstance(module, RoutedLinear)]
    assert len(weights) == 14 and all(type(weight) is not torch.nn.Parameter for weight in weights)
    kept = not_base(whole)
    assert kept.keys() == not_base(model).keys()
    assert all(torch.equal(value, kept[name]) for name, value in not_base(model).items())
    batch = batch_inputs([row_inputs(each) for each in ROWS])
    real = batch["attention_mask"].bool()
    for rows, mask in enumerate(real):
        assert 0 < distance(model(**batch).logits[rows][mask], whole(**batch).logits[rows][mask]) < NEAR[kind]


@torch.no_grad()
def test_rows_stay_independent_on_a_quantized_base() -> None:
    model = quantized("int8")
    rows = [row_inputs(kind) for kind in ROWS]
    batch = batch_inputs(rows)
    logits = model(**batch).logits
    for i, row in enumerate(rows):
        alone = model(**batch_inputs([row])).logits[0]
        assert (logits[i][batch["attention_mask"][i].bool()] - alone).abs().max() < 2e-4 * logits.std()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def dequantized(model: torch.nn.Module) -> MixLoraForConditionalGeneration:
    """The model in full precision with the weights that a quantized one stands for."""
    whole = tiny_model().requires_grad_(False)
    for name, module in whole.named_modules():
        if isinstance(module, RoutedLinear):
            module.base_layer.weight.copy_(model.get_submodule(name).base_layer.weight.dequantize())
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_on_a_quantized_base(kind: str) -> None:
    """Their gradients are those on the weights that the base stands for; the base gets none."""
    batch = batch_inputs([row_inputs(each) for each in ROWS])
    gradients = []
    for model in (quantized(kind), dequantized(quantized(kind))):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        model.train()(**batch, use_cache=False).logits[batch["attention_mask"].bool()].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    found, wanted = gradients
    assert found.keys() == wanted.keys() and found and all(".lora_" in name for name in found)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-3 * wanted[name].norm(), name


@torch.no_grad()
def test_an_adapter_goes_from_one_base_to_the_other(tmp_path: Any) -> None:
    whole, model = tiny_model(), quantized("int8")
    before = not_base(model)
    model.save_adapter(tmp_path / "out", "vision")
    whole.delete_adapter("vision")
    whole.load_adapter(tmp_path / "out", "vision")
    assert all(torch.equal(value, before[name]) for name, value in not_base(whole).items())
    model.delete_adapter("vision")
    model.load_adapter(tmp_path / "out", "vision")
    assert all(torch.equal(value, before[name]) for name, value in not_base(model).items())


@torch.no_grad()
def test_from_pretrained_quantizes_the_base_alone(tmp_path: Any) -> None:
    """By transformers' own configuration, which names what is left as it is."""
    from transformers import TorchAoConfig

    whole = tiny_model()
    whole.save_pretrained(tmp_path)

    config = TorchAoConfig(KINDS["int8"](), modules_to_not_convert=LEFT)
    model = MixLoraForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config).eval()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    assert torch.equal(model(**batch).logits, quantized("int8")(**batch).logits)
    kept = not_base(whole)
    assert all(torch.equal(value, kept[name]) for name, value in not_base(model).items())


@torch.no_grad()
def test_bitsandbytes_replaces_the_base_alone(tmp_path: Any) -> None:
    """Its layers take the place of `base_layer`; NF4 on a CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    whole = tiny_model()
    whole.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=LEFT)
    model = MixLoraForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    layers = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14 and all(name.endswith(".base_layer") for name in layers)
    kept = not_base(whole)
    assert all(torch.equal(value, kept[name]) for name, value in not_base(model).items())
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    real = batch["attention_mask"].bool()
    assert 0 < distance(model(**batch).logits[real], whole(**batch).logits[real]) < NEAR["int4"]
