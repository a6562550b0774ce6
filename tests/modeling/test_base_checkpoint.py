"""A checkpoint that names its base gives the same model, and refuses another base."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForMultimodalLM

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import make_loud
from tests.modeling.test_parts import FAMILIES


@torch.no_grad()
def test_the_base_is_named_and_checked(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "model"
    make_loud(FAMILIES["qwen2"](), seed=2).save_pretrained(base)
    model = MixLoraForConditionalGeneration.from_parts(base, adapters={"vision": {"r": 2}}, refer_to_base=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.eval().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert all(".lora_" in name for name in saved.keys())
    ids = torch.tensor([[5, 6, 7, 8]])
    for adapter in (-1, 0):
        inputs = {"input_ids": ids, "adapter_ids": torch.tensor([adapter])}
        for loader in (MixLoraForConditionalGeneration, AutoModelForMultimodalLM):
            assert torch.equal(loader.from_pretrained(folder).eval()(**inputs).logits, model(**inputs).logits)
    inner, wanted = AutoModel.from_pretrained(folder), model.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in inner.state_dict().items())

    make_loud(FAMILIES["qwen2"](), seed=9).save_pretrained(base)
    with pytest.raises(ValueError, match="not the decoder that this checkpoint was trained with"):
        MixLoraForConditionalGeneration.from_pretrained(folder)
