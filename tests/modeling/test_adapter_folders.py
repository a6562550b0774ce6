"""Adapter folders travel between PEFT and us."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import make_loud
from tests.modeling.test_parts import FAMILIES, SIZES

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def llama():
    return make_loud(LlamaForCausalLM(LlamaConfig(**SIZES)), seed=4).eval()


@torch.no_grad()
def test_our_folder_loads_in_peft(tmp_path):
    model = make_loud(MixLoraForConditionalGeneration.from_parts(llama(), adapters={"speech": {"r": 3, "alpha": 6}}))
    decoder = llama()
    state = {n.replace(".base_layer", "").replace("language_model.", ""): v for n, v in model.state_dict().items()}
    decoder.load_state_dict({name: state[name] for name in decoder.state_dict()})
    model.save_adapter(tmp_path, "speech")
    theirs = PeftModel.from_pretrained(decoder, tmp_path).eval()
    ours = model.eval()(input_ids=IDS, adapter_ids=torch.tensor([0])).logits
    torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("prefix", [True, False])
def test_pefts_folder_loads_here(family, rslora, prefix, tmp_path):
    decoder = llama() if family == "llama" else make_loud(FAMILIES["phi3"](), seed=4).eval()
    model = MixLoraForConditionalGeneration.from_parts(decoder).eval()
    targets = ["q_proj", "down_proj"] if family == "llama" else ["qkv_proj", "gate_up_proj"]
    theirs = get_peft_model(decoder, LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora)).eval()
    make_loud(torch.nn.ModuleList(m for n, m in theirs.named_modules() if n.endswith(("lora_A", "lora_B"))))
    theirs.save_pretrained(tmp_path)
    if not prefix:
        file = tmp_path / "adapter_model.safetensors"
        save_file({name.removeprefix("base_model.model."): t for name, t in load_file(file).items()}, file)
    before = model(input_ids=IDS).logits
    model.load_adapter(tmp_path, adapter_name="vision")
    ours = model(input_ids=IDS, adapter_ids=torch.tensor([0])).logits
    torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, rtol=1e-4, atol=2e-4)
    assert torch.equal(model(input_ids=IDS, adapter_ids=torch.tensor([-1])).logits, before)
    model.delete_adapter("vision")
    assert torch.equal(model(input_ids=IDS).logits, before) and not model.config.adapters


def test_what_we_cannot_do_is_refused_by_name(tmp_path):
    model = MixLoraForConditionalGeneration.from_parts(llama(), adapters={"vision": {"r": 2}})
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "d")
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "zero")
    for folder, name, message in (
        ("d", "x", "use_dora"),
        ("zero", "x", "lora_B is zero"),
        ("zero", "vision", "already"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / folder, adapter_name=name)
    for call in (lambda: model.set_adapter("vision"), model.disable_adapters, lambda: model.delete_adapter("none")):
        with pytest.raises(ValueError, match="row by row|no adapter 'none'"):
            call()
