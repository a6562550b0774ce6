"""Adapter folders travel between PEFT and us."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import make_loud
from tests.modeling.test_parts import reference

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TENSORS = "adapter_model.safetensors"
UP = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
FAMILIES = ["smollm2", "phi3", "starcoder2"]
"""Split projections, fused ones, and an MLP of two."""
SOME = {"smollm2": ["q_proj", "down_proj"], "phi3": ["qkv_proj", "gate_up_proj"], "starcoder2": ["k_proj", "c_fc"]}


def logits(model: torch.nn.Module, adapter: int | None = None) -> torch.Tensor:
    route = {} if adapter is None else {"adapter_ids": torch.tensor([adapter])}
    return model.eval()(input_ids=IDS, **route).logits


def trained(decoder: torch.nn.Module, **options: Any) -> PeftModel:
    """PEFT's model with a loud adapter."""
    model = get_peft_model(decoder, LoraConfig(**options)).eval()
    make_loud(torch.nn.ModuleList(m for n, m in model.named_modules() if n.endswith(("lora_A", "lora_B"))))
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("uneven", [False, True], ids=["everywhere", "uneven"])
def test_our_folder_loads_in_peft(family: str, uneven: bool, tmp_path: Path) -> None:
    """Also where ranks and alphas differ, and one layer alone has a pair."""
    first, second = SOME[family]
    place = f"layers.1.{'self_attn' if first != 'c_fc' else 'mlp'}.{first}"
    spec: dict[str, Any] = {"r": 3, "alpha": 6}
    if uneven:
        spec |= {"target_modules": [place, second], "rank_pattern": {second: 5}, "alpha_pattern": {place: 9}}
    decoder = reference(family)
    model = make_loud(MixLoraForConditionalGeneration.from_parts(decoder, adapters={"speech": spec}))
    state = {n.replace(".base_layer", "").replace("language_model.", ""): v for n, v in model.state_dict().items()}
    decoder.load_state_dict({name: state[name] for name in decoder.state_dict()})
    model.save_adapter(tmp_path, "speech")
    ours = logits(model, 0)
    theirs = PeftModel.from_pretrained(decoder, tmp_path)
    assert_same(ours, logits(theirs))
    assert (ours - logits(model, -1)).abs().max() > 0.1 * ours.std()
    pairs = [name for name in load_file(tmp_path / TENSORS) if ".lora_A." in name]
    assert len(pairs) == (3 if uneven else len(model.model.language_model.projections()))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "bare"])
def test_pefts_folder_loads_here(family: str, rslora: bool, prefix: bool, tmp_path: Path) -> None:
    decoder = reference(family)
    model = MixLoraForConditionalGeneration.from_parts(decoder).eval()
    theirs = trained(decoder, r=4, lora_alpha=6, target_modules=SOME[family], use_rslora=rslora)
    theirs.save_pretrained(tmp_path)
    if not prefix:
        file = tmp_path / TENSORS
        save_file({name.removeprefix("base_model.model."): t for name, t in load_file(file).items()}, file)
    before = logits(model)
    model.load_adapter(tmp_path, adapter_name="vision")
    assert_same(logits(model, 0), logits(theirs))
    assert torch.equal(logits(model, -1), before)
    assert model.config.adapters["vision"]["target_modules"] == sorted(SOME[family])
    model.delete_adapter("vision")
    assert torch.equal(logits(model), before) and not model.config.adapters


UNEVEN: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 7}},
    "alphas": {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 20}},
    "ranks and alphas": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 1}},
    "one layer": {"layers_to_transform": [1]},
    "expression": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "without": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_a_folder_of_uneven_ranks_loads_here_and_goes_back(kind: str, rslora: bool, tmp_path: Path) -> None:
    """From PEFT to us, through a checkpoint of ours, and to PEFT again."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": rslora} | UNEVEN[kind]
    theirs = trained(reference("smollm2"), **options)
    theirs.save_pretrained(tmp_path / "theirs")
    model = MixLoraForConditionalGeneration.from_parts(reference("smollm2"))
    model.load_adapter(tmp_path / "theirs", adapter_name="vision")
    ours = logits(model, 0)
    assert_same(ours, logits(theirs))
    model.save_pretrained(tmp_path / "checkpoint")
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits(again, 0), ours)
    assert again.parameter_groups()["adapter.vision"] == model.parameter_groups()["adapter.vision"]
    again.save_adapter(tmp_path / "back", "vision")
    assert_same(logits(PeftModel.from_pretrained(reference("smollm2"), tmp_path / "back")), ours)
    before, after = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "back" / TENSORS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT."""
    path = tmp_path_factory.mktemp("adapter")
    trained(reference("smollm2"), r=2, target_modules=["q_proj"]).save_pretrained(path)
    return path


def copied(folder: Path, to: Path, changes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A copy with changes in its config and among its tensors."""
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (to / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    save_file(load_file(folder / TENSORS) | tensors, to / TENSORS)
    return to


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"bias": "all"}, {}, "bias='all' is not supported"),
        ({"lora_bias": True}, {}, "lora_bias=True is not supported"),
        ({"trainable_token_indices": [3]}, {}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_parameters": ["x.weight"]}, {}, "target_parameters=.* is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, {}, "layer_replication=.* is not supported"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa' is not supported, since it changes the base"),
        ({"r": 8}, {}, "layers.0.self_attn.q_proj is of rank 2, but the config says 8"),
        ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)},
         "lora_magnitude_vector'.* are not lora_A or lora_B"),
        ({}, {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, "lm_head.* are not lora_A or lora_B"),
        ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 32)},
         "'layers.9.mlp.up_proj'. are not projections of this decoder, such as layers.0"),
        ({}, {UP: torch.ones(5, 2)}, r"q_proj.lora_B has shape \(5, 2\), expected \(32, 2\)"),
        ({}, {f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_B.weight": torch.zeros(32, 2) for n in (0, 1)},
         "every lora_B is zero"),
    ],
)  # fmt: skip
def test_what_we_cannot_do_is_refused_by_name(
    changes: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, folder: Path, tmp_path: Path
) -> None:
    """And nothing of the folder is left in the model."""
    model = MixLoraForConditionalGeneration.from_parts(reference("smollm2"), adapters={"vision": {"r": 2}})
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.load_adapter(copied(folder, tmp_path / "changed", changes, tensors), adapter_name="other")
    assert names == [name for name, _ in model.named_parameters()] and list(model.config.adapters) == ["vision"]
    with pytest.raises(ValueError, match="'vision' is there already"):
        model.load_adapter(folder, adapter_name="vision")


def test_other_methods_and_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    model = MixLoraForConditionalGeneration.from_parts(reference("smollm2"))
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(reference("smollm2"), ia3).save_pretrained(tmp_path / "ia3")
    save_file(load_file(folder / TENSORS), tmp_path / "ia3" / TENSORS)
    with pytest.raises(ValueError, match="IA3.* is not LoRA"):
        model.load_adapter(tmp_path / "ia3")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="holds no adapter_model.safetensors; pickled"):
        model.load_adapter(tmp_path / "pickled")
