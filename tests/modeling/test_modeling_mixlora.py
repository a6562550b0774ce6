"""The promises of the model on loud random weights."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.projectors import compress_by_ctc
from mixlora.modeling.routed_lora import RoutedLinear
from tests.modeling.model_fixtures import (
    AUDIO,
    IMAGE,
    ROWS,
    batch_inputs,
    make_loud,
    of_type,
    row_inputs,
    tiny_config,
    tiny_model,
)


def plain_decoder(model):
    """The decoder of `model` alone: no tower, no adapter."""
    alone = MixLoraForConditionalGeneration(tiny_config(adapters={}, vision_config=None, speech_config=None)).eval()
    state = model.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    return alone


def llama_of(model):
    """transformers' Llama with the weights of a model's decoder."""
    model = plain_decoder(model)
    text = model.config.text_config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(text, name) for name in names}, pad_token_id=0)).eval()
    state = {
        name.replace("language_model.", "").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
    }
    llama.load_state_dict(state)
    return llama


@torch.no_grad()
def test_decoder_matches_llama():
    model = tiny_model()
    batch = batch_inputs([row_inputs("text"), row_inputs("text", seed=3)], "right")
    torch.testing.assert_close(model(**batch).logits, llama_of(model)(**batch).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 12, 40])
def test_rows_of_the_base_keep_the_bits_of_llama(length):
    """Where other libraries or orders of adding would show; with padding, and beside an adapter's row."""
    torch.manual_seed(0)
    size = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=300, pad_token_id=0, **size)).eval()
    spec = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": None}
    model = MixLoraForConditionalGeneration.from_parts(decoder=llama, adapters={"vision": spec}).eval()
    ids, mask = torch.randint(5, 300, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, -1] = 0
    want = llama(ids, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], want)
    beside = model(ids, attention_mask=mask, adapter_ids=torch.tensor([-1, 0])).logits[0]
    assert torch.equal(beside, want[:length])


@torch.no_grad()
def test_text_row_equals_the_decoder_bit_for_bit():
    model = tiny_model()
    batch = batch_inputs([row_inputs("text"), row_inputs("text", seed=5)])
    assert torch.equal(model(**batch).logits, plain_decoder(model)(**batch).logits)
    mixed = batch_inputs([row_inputs("text"), row_inputs("image")])
    alone = dict(mixed, adapter_ids=torch.tensor([-1, -1]))
    assert torch.equal(model(**mixed).logits[0], model(**alone).logits[0])
    assert not torch.allclose(model(**mixed).logits[1], model(**alone).logits[1], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "speech",
    [
        {},
        {"speech_blank_token_id": 0},
        {"speech_context": {"layers": 1}},
        {"speech_context": {"layers": 1, "stride": 2}, "speech_letters": {}, "speech_blank_token_id": 0},
    ],
    ids=["projected", "ctc", "context", "letters"],
)
def test_rows_in_a_batch_equal_rows_alone(training, side, attention, speech):
    """With convolutions in double precision: loud ones amplify the rounding of single precision past the bound, which
    is wide enough for what processors of several makes round differently."""
    dtype, bound = (torch.double, 1e-10) if "speech_context" in speech else (torch.float, 1e-3)
    model = tiny_model(**speech).to(dtype).train(training)
    model.set_attn_implementation(attention)
    rows = [row_inputs(kind) for kind in ROWS]
    batch = of_type(batch_inputs(rows, side), dtype)
    logits = model(**batch).logits
    scale = logits.std()
    for i, row in enumerate(rows):
        alone = model(**of_type(batch_inputs([row]), dtype)).logits[0]
        real = logits[i][batch["attention_mask"][i].bool()]
        assert (real - alone).abs().max() < bound * scale, ROWS[i]


@torch.no_grad()
def test_a_clip_beside_a_picture_stays_as_it_is_projected():
    model = tiny_model(speech_blank_token_id=0)
    features = [torch.randn(12, model.model.speech_tower.feature_size) for _ in range(2)]
    beside = [False, True]
    projected = model.model.project_speech(model.model.stack_speech(features), beside)
    alone, paired = model.model.get_audio_features(features=features, beside_picture=beside).pooler_output
    assert torch.equal(paired, projected[1])
    assert torch.equal(alone, compress_by_ctc(projected[0], model.get_input_embeddings().weight, 0))
    assert not torch.equal(alone, projected[0])


def merged_llama(model, adapter):
    """transformers' Llama with an adapter folded into its weights."""
    llama = llama_of(model)
    for path, module in model.model.language_model.named_modules():
        if isinstance(module, RoutedLinear) and adapter is not None:
            delta = module.lora_B[adapter].weight @ module.lora_A[adapter].weight * module.scaling[adapter]
            llama.get_submodule(f"model.{path}").weight.add_(delta)
    return llama


def batching_noise(call, batch, alone):
    """For each row the largest difference between its logits in the batch and alone, in their standard deviations."""
    together = call(batch)
    real = [logits[mask.bool()] for logits, mask in zip(together, batch["attention_mask"], strict=True)]
    return [float((mine - call(row)[0]).abs().max() / together.std()) for mine, row in zip(real, alone, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_routing_adds_little_to_the_noise_of_batching(side):
    """A batch rounds otherwise than a row alone, with adapters merged into the weights too (promise 2)."""
    model = tiny_model()
    rows = [row_inputs(kind) for kind in ROWS]
    batch, alone = batch_inputs(rows, side), [batch_inputs([row]) for row in rows]
    ours = batching_noise(lambda inputs: model(**inputs).logits, batch, alone)

    def reference(adapter):
        llama = merged_llama(model, adapter)

        def call(inputs):
            media = {name: value for name, value in inputs.items() if name != "attention_mask"}
            embeds = model.model.embed(inputs["input_ids"], model.model.encode_media(**media))
            return llama(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits

        return batching_noise(call, batch, alone)

    noise = {adapter: reference(adapter) for adapter in (None, "vision", "speech")}
    adapters = {"text": None, "image": "vision", "both": "vision", "speech": "speech", "two_clips": "speech"}
    for i, kind in enumerate(ROWS):
        assert ours[i] <= 4 * max(noise[adapters[kind]][i], 1e-6), kind


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_in_a_batch_equals_alone(options):
    model = tiny_model()
    rows = [row_inputs(kind) for kind in ("two_clips", "speech", "text", "both", "image")]
    batch = batch_inputs(rows)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False, **options)[:, batch["input_ids"].shape[1] :]
    together = together.reshape(len(rows), -1, together.shape[-1])
    for i, row in enumerate(rows):
        alone = model.generate(**batch_inputs([row]), max_new_tokens=6, do_sample=False, **options)[
            :, len(row["ids"]) :
        ]
        for mine, theirs in zip(together[i], alone, strict=False):
            length = min(len(mine), len(theirs))
            assert mine[:length].tolist() == theirs[:length].tolist()


@torch.no_grad()
def test_samples_keep_their_route():
    """Several samples of each row, rows of every kind side by side."""
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    torch.manual_seed(0)
    out = model.generate(
        **batch,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = model(**batch).logits[:, -1]
    first = out.logits[0].reshape(len(ROWS), 3, -1)
    assert (first - wanted[:, None]).abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
def test_cached_equals_uncached():
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    cached = model.generate(**batch, max_new_tokens=8, do_sample=False)
    uncached = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_speech_beside_a_picture_takes_the_vision_speech_projector():
    model = tiny_model()
    batch = batch_inputs([row_inputs("speech"), row_inputs("both"), row_inputs("image")])
    before = model(**batch).logits
    for parameter in model.model.speech_projector["vision_speech"].parameters():
        parameter.mul_(1.5)
    after = model(**batch).logits
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixed_batch_gives_each_adapter_the_gradients_of_its_own_batch(checkpointing):
    def gradients(groups):
        model = tiny_model().double().train()  # in fp64 only a real difference shows
        if checkpointing:
            model.activation_checkpointing_enable()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "projector" in name)
        for rows in groups:
            batch = batch_inputs(rows)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            labels = labels.masked_fill((labels == IMAGE) | (labels == AUDIO), -100)
            first = batch["attention_mask"].argmax(-1, keepdim=True)
            labels = labels.scatter(1, first, -100)  # a pad token must not predict the row's first token
            loss = model(**batch, labels=labels, num_items_in_batch=torch.tensor(50)).loss
            if loss.requires_grad:  # a text row alone trains nothing
                loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    rows = [row_inputs(kind) for kind in ROWS]
    mixed, apart = gradients([rows]), gradients([[row] for row in rows])
    assert mixed.keys() == apart.keys() and any("lora_A.speech" in name for name in mixed)
    for name in mixed:
        assert (mixed[name] - apart[name]).norm() <= 1e-5 * apart[name].norm(), name


def test_frozen_towers_stay_in_eval():
    model = tiny_model()
    model.requires_grad_(False)
    model.train()
    assert not model.model.vision_tower.training and not model.model.speech_tower.training
    assert model.model.language_model.training


@torch.no_grad()
@pytest.mark.parametrize(
    "loader",
    [
        MixLoraForConditionalGeneration,
        AutoModelForMultimodalLM,
        AutoModelForImageTextToText,
        AutoModelForCausalLM,
    ],
)
@pytest.mark.parametrize("options", [{}, {"device_map": "auto", "dtype": "auto"}])
def test_save_and_reload(loader, options, tmp_path):
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    model.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path, **options).eval()
    assert type(again) is MixLoraForConditionalGeneration
    assert torch.equal(model(**batch).logits, again(**batch).logits)


@torch.no_grad()
def test_rotary_frequencies_stay_fp32():
    model = tiny_model().to(torch.bfloat16)
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_fused_projections_and_options_run():
    model = make_loud(
        MixLoraForConditionalGeneration(
            tiny_config(
                text={
                    "fused_projections": True,
                    "qk_norm": True,
                    "attention_bias": True,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                },
                adapters={"vision": {"r": 2, "alpha": 2}},
                routing={"speech": None},
            )
        )
    ).eval()
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda b: b["input_ids"].__setitem__((0, 2), 20), "row 0"),
        (lambda b: b.pop("pixel_values"), "row 0 holds 4 image placeholders"),
        (lambda b: b.update(adapter_ids=torch.tensor([7, 0])), "row 0: adapter id 7"),
        (
            lambda b: b.update({name: b[name][:, :-1] for name in ("input_features", "input_features_mask")}),
            "not a multiple of the tower's window",
        ),
    ],
)
def test_bad_input_names_the_row(spoil, message):
    model = tiny_model()
    batch = batch_inputs([row_inputs("image"), row_inputs("speech")], side="right")
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_filled_cache_needs_adapter_ids():
    model = tiny_model()
    batch = batch_inputs([row_inputs("image")])
    cache = model(**batch).past_key_values
    with pytest.raises(ValueError, match="adapter_ids"):
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)


def test_a_modality_without_its_adapter_raises():
    with pytest.raises(ValueError, match="row 0 .speech. needs adapter 'voice'"):
        tiny_model(routing={"speech": "voice"})(**batch_inputs([row_inputs("speech")]))


def test_groups_cover_every_parameter():
    model = tiny_model()
    groups = model.parameter_groups()
    assert set(groups) == {
        "decoder",
        "adapter.vision",
        "adapter.speech",
        "vision_tower",
        "vision_projector",
        "speech_tower",
        "speech_projector.speech",
        "speech_projector.vision_speech",
    }
    assert sorted(sum(groups.values(), [])) == sorted(name for name, _ in model.named_parameters())


def test_an_untied_head_belongs_to_the_decoder():
    assert "lm_head.weight" in tiny_model(text={"tie_word_embeddings": False}).parameter_groups()["decoder"]


@torch.no_grad()
def test_adapter_ids_mean_the_same_after_reloading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert model.router.names == again.router.names == ["speech", "vision"]
    for adapter in (0, 1):
        inputs = batch_inputs([row_inputs("text")]) | {"adapter_ids": torch.tensor([adapter])}
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
