"""What transformers' models inherit for adapters acts on ours, or says what to do; one adapter can be merged."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.routed_lora import RoutedLinear
from tests.modeling.model_fixtures import batch_inputs, make_loud, row_inputs, tiny_model
from tests.modeling.test_parts import reference


@pytest.mark.parametrize(
    "method", ["set_adapter", "disable_adapters", "enable_adapters", "active_adapters", "enable_peft_hotswap"]
)
def test_no_method_switches_an_adapter_for_all_rows(method: str) -> None:
    model = tiny_model()
    for each in (model, model.model, model.model.language_model):
        with pytest.raises(ValueError, match="row by row here: pass adapter_ids"):
            getattr(each, method)("vision")


@pytest.mark.parametrize("method", ["add_adapter", "load_adapter", "delete_adapter", "get_adapter_state_dict"])
def test_the_inner_models_send_to_the_outer_one(method: str) -> None:
    """Inherited, `add_adapter` would put PEFT's layers inside ours."""
    model = tiny_model()
    with pytest.raises(ValueError, match="of MixLoraForConditionalGeneration add, read, write, remove"):
        getattr(model.model, method)(LoraConfig(target_modules=["q_proj"]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["entry", "lora", "rslora", "all-linear"])
def test_add_adapter_adds_a_fresh_one(kind: str, tmp_path: Path) -> None:
    """It changes nothing until it is trained, then acts on its rows alone, and is saved."""
    model, batch = tiny_model(), batch_inputs([row_inputs("text"), row_inputs("text", seed=4)])
    if kind == "entry":
        config = {"r": 3, "alpha": 5, "dropout": 0.1, "target_modules": ["q_proj"]}
    else:
        targets = "all-linear" if kind == "all-linear" else ["q_proj"]
        config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=targets, use_rslora=kind == "rslora")
    model.add_adapter(config, "new")
    everywhere = sorted({path.rsplit(".", 1)[-1] for path in model.model.language_model.projections()})
    assert model.config.adapters["new"] == {
        "r": 3,
        "alpha": 5 * 3**0.5 if kind == "rslora" else 5,
        "dropout": 0.1,
        "target_modules": everywhere if kind == "all-linear" else ["q_proj"],
    }
    ids = torch.tensor([-1, model.router.names.index("new")])
    base = model(**batch, adapter_ids=torch.tensor([-1, -1])).logits
    assert torch.equal(model(**batch, adapter_ids=ids).logits, base)
    for name in model.parameter_groups()["adapter.new"]:
        torch.nn.init.normal_(model.get_parameter(name))
    acted = model(**batch, adapter_ids=ids).logits
    assert torch.equal(acted[0], base[0]) and (acted[1] - base[1]).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch, adapter_ids=ids).logits, acted)
    model.train()
    assert not torch.equal(model(**batch, adapter_ids=ids).logits[1], acted[1])  # its dropout


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ({"r": 2}, "vision", "'vision' is there already"),
        ({"r": 0}, "new", "r must be an integer above 0, got 0"),
        ({"r": 2, "rank": 3}, "new", r"unknown \['rank'\]"),
        ({"r": 2}, "a.b", "without dots"),
        ({"r": 2, "target_modules": ["q_proj", "qkv_proj"]}, "new", "names 'qkv_proj', which is no projection"),
        (LoraConfig(target_modules=["qkv_proj"]), "new", "are not projections of this decoder, such as layers.0"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "new", r"\['lm_head'\] are not projections"),
        (LoraConfig(), "new", "target_modules is needed"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "new", "use_dora=True is not supported"),
        ("a folder", "new", "is not LoRA"),
    ],
)
def test_a_wrong_adapter_is_not_added(config: object, name: str, message: str) -> None:
    model = tiny_model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_adapter(config, name)
    assert before == [name for name, _ in model.named_parameters()] and len(model.config.adapters) == 2


def test_an_adapter_of_the_config_must_name_projections_too() -> None:
    with pytest.raises(ValueError, match="target_modules names 'c_fc', which is no projection of this decoder"):
        tiny_model(adapters={"vision": {"r": 2, "target_modules": ["q_proj", "c_fc"]}})


def test_delete_takes_all_of_a_list_or_none() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no adapter 'none'"):
        model.delete_adapter(["vision", "none"])
    assert set(model.config.adapters) == {"vision", "speech"}
    model.delete_adapter(["vision", "speech"])
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_state_dict_of_an_adapter_has_pefts_names() -> None:
    model = tiny_model()
    state = model.get_adapter_state_dict("speech")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    pair = model.model.language_model.layers[0].mlp.up_proj
    assert torch.equal(state[name], pair.lora_A["speech"].weight) and len(state) == 2 * 2 * 7


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_logits_are_those_of_the_adapter(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    batch = batch_inputs([row_inputs("speech"), row_inputs("two_clips")])
    want, tokens = model(**batch).logits, model.generate(**batch, max_new_tokens=6, do_sample=False)
    base = model(**batch, adapter_ids=torch.tensor([-1, -1])).logits
    count = sum(p.numel() for p in model.model.language_model.parameters())
    model.merge_adapter("speech")
    merged = model(**batch).logits
    bound = (2e-4 if dtype == torch.float32 else 1e-12) * want.std()
    assert (merged - want).abs().max() < bound < (base - want).abs().max()
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), tokens)
    assert sum(p.numel() for p in model.model.language_model.parameters()) < count
    assert not any("lora_" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_a_merged_model_refuses_rows_of_other_routes() -> None:
    """Never answered by the wrong weights: not text, not another adapter; a picture beside speech is vision's."""
    model = tiny_model()
    both = batch_inputs([row_inputs("both"), row_inputs("image")])
    want = model(**both).logits
    model.merge_adapter("vision")
    assert (model(**both).logits - want).abs().max() < 2e-4 * want.std()
    for kind, takes in (("text", "the base alone"), ("speech", "adapter 'speech'")):
        batch = batch_inputs([row_inputs("image"), row_inputs(kind)])
        for call in (lambda inputs: model(**inputs), lambda inputs: model.generate(**inputs, max_new_tokens=1)):
            with pytest.raises(ValueError, match=f"row 1 .{kind}. takes {takes}, but adapter 'vision' is merged"):
                call(batch)
    text = batch_inputs([row_inputs("text")])
    assert model(**text, adapter_ids=torch.tensor([-1])).logits.isfinite().all()
    with pytest.raises(ValueError, match="row 0: adapter id 0"):
        model(**text, adapter_ids=torch.tensor([0]))


@torch.no_grad()
@pytest.mark.parametrize("loader", [MixLoraForConditionalGeneration, AutoModelForCausalLM])
def test_a_saved_merged_model_says_what_it_is(loader: type, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_adapter(tmp_path / "adapter", "speech")
    batch = batch_inputs([row_inputs("speech")])
    model.merge_adapter("speech")
    logits = model(**batch).logits
    model.save_pretrained(tmp_path / "merged")
    again = loader.from_pretrained(tmp_path / "merged").eval()
    assert again.config.merged_adapter == "speech" and again.config.adapters == {}
    assert torch.equal(again(**batch).logits, logits)
    for call, message in (
        (lambda: again(**batch_inputs([row_inputs("text")])), "is merged"),
        (lambda: again.load_adapter(tmp_path / "adapter", "other"), "'speech' is merged .* no other adapter"),
        (lambda: again.add_adapter({"r": 2}, "other"), "'speech' is merged .* no other adapter"),
        (lambda: again.save_adapter(tmp_path / "x", "speech"), "no adapter 'speech'"),
        (lambda: again.merge_adapter("speech"), "no adapter 'speech'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@torch.no_grad()
def test_a_merged_model_no_longer_refers_to_its_base(tmp_path: Path) -> None:
    """Its decoder is another one now, so the checkpoint holds it."""
    reference("qwen2").save_pretrained(tmp_path / "base")
    model = MixLoraForConditionalGeneration.from_parts(
        tmp_path / "base", adapters={"vision": {"r": 2}}, refer_to_base=True
    ).eval()
    make_loud(torch.nn.ModuleList(m for n, m in model.named_modules() if n.endswith(("lora_A", "lora_B"))))
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    want = model(**inputs, adapter_ids=torch.tensor([0])).logits
    model.merge_adapter("vision")
    model.save_pretrained(tmp_path / "merged")
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    found = again(**inputs, adapter_ids=torch.tensor([-1])).logits
    assert again.config.base_model is None and (found - want).abs().max() < 2e-4 * want.std()


def test_a_quantized_decoder_is_not_merged_and_stays_whole() -> None:
    model = tiny_model()
    linear: RoutedLinear = model.model.language_model.layers[1].mlp.down_proj
    linear.base_layer.weight = torch.nn.Parameter(linear.base_layer.weight.to(torch.int8), requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="'speech' can't be merged: the decoder's weights are quantized"):
        model.merge_adapter("speech")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
