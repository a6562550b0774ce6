"""`rope_mode="fixed_long"`: a model's rows take LongRoPE's long factors at every length, and nothing is rebuilt."""

import pytest
import torch

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import batch_inputs, row_inputs
from tests.modeling.test_rope_switch import SWITCH, long_model, text_row


@torch.no_grad()
def test_a_short_row_has_the_logits_of_an_announced_long_one() -> None:
    fixed, by_length = long_model(rope_mode="fixed_long"), long_model()
    batch = batch_inputs([row_inputs("image"), text_row(9)])
    announced = by_length(**batch, row_lengths=torch.tensor([SWITCH + 1, SWITCH + 1])).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(fixed(**batch).logits[real], announced[real])
    assert not torch.allclose(by_length(**batch).logits[real], announced[real], atol=1e-2)
    beyond = batch_inputs([text_row(SWITCH + 5)])
    assert torch.equal(fixed(**beyond).logits, by_length(**beyond).logits)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generation_passes_the_old_limit_without_a_rebuilt_cache(options, monkeypatch) -> None:
    model = long_model(1, rope_mode="fixed_long")
    batch = batch_inputs([text_row(SWITCH - 4)])
    monkeypatch.setattr("mixlora.modeling.backbone.replace_rows", None)  # so that using it would raise
    shared = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, **shared, **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, model.generate(**batch, **shared, use_cache=False))
    assert len(found.past_key_values.layers) == 2  # no embeddings are kept


def test_the_mode_is_kept_on_disk_and_chosen_at_loading(tmp_path) -> None:
    by_length = long_model()
    by_length.save_pretrained(tmp_path)
    config = MixLoraConfig.from_pretrained(tmp_path)
    assert config.text_config.rope_mode == "by_length"
    config.text_config.rope_mode = "fixed_long"
    model = MixLoraForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert not model.model.language_model.rotary_emb.varies
    model.save_pretrained(tmp_path)
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.rope_mode == "fixed_long"
    assert not again.model.language_model.rotary_emb.varies
