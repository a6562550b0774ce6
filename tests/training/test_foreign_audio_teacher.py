"""A teacher of another class that hears: a tiny Qwen2-Audio, with its own processor, template and placeholders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from mixlora.modeling.audio_processing_mixlora import load_clip
from mixlora.training.objectives import response_mask
from mixlora.training.train import train
from tests.modeling.model_fixtures import make_loud
from tests.modeling.processor_fixtures import tiny_tokenizer
from tests.training.taught_fixtures import log
from tests.training.test_foreign_teacher import prepared
from tests.training.training_fixtures import chat, write_recipe

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|AUDIO|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|end|>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def hearing(tmp_path: Path) -> str:
    """It hears a second at most; its answers end by the student's token."""
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|AUDIO|>"], special_tokens=True)
    audio = {
        "model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 50,
    }  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=len(tokenizer) - 1)
    folder = tmp_path / "qwen"
    make_loud(Qwen2AudioForConditionalGeneration(config)).save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def heard(rows: Path) -> Path:
    """A clip, text alone, and a longer clip."""
    path = rows.with_name("heard.jsonl")
    lines: list[dict[str, Any]] = [chat("a", "yes", 1), chat("", "no way", 2), chat("a", "a dog", 8)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def by_hand(folder: str, prompt: str, answer: str, clip: Path | None) -> torch.Tensor:
    """The states that predict an answer and its end, placeholders written out."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    media: dict[str, Any] = {}
    if clip is not None:
        features = processor.feature_extractor(
            load_clip(clip), sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        frames = int(features["attention_mask"].sum())
        prompt = prompt.replace("<|AUDIO|>", "<|AUDIO|>" * (((frames - 1) // 2 + 1 - 2) // 2 + 1))
        media = {"input_features": features["input_features"], "feature_attention_mask": features["attention_mask"]}
    before, words = (processor.tokenizer(text)["input_ids"] for text in (prompt, answer + "<|end|>"))
    ids = torch.tensor([before + words])
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids), **media, output_hidden_states=True)
    return states.hidden_states[-1][0, len(before) - 1 : -1]


@torch.no_grad()
def test_it_hears_the_clips_of_its_own_prompts(start: str, heard: Path, hearing: str) -> None:
    foreign, inputs = prepared(start, heard, hearing)
    states = foreign.hidden(inputs, inputs["teacher_inputs"])
    masks = response_mask(inputs["labels"])
    expected = [
        by_hand(hearing, "[user] <|AUDIO|>??\n[assistant] ", "yes", heard.with_name("1.wav")),
        by_hand(hearing, "[user] ???\n[assistant] ", "no way", None),
        by_hand(hearing, "[user] <|AUDIO|>???\n[assistant] ", "a dog", heard.with_name("8.wav")),
    ]
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(states[row][masks[row]], wanted, rtol=1e-4, atol=1e-5)


def test_a_student_comes_nearer_to_it(tmp_path: Path, start: str, heard: Path, hearing: str) -> None:
    recipe = write_recipe(
        tmp_path, start, heard, ["decoder", "speech_projector.speech", "adapter.speech"], objective="mimic",
        teacher=hearing, teacher_cache="float32", max_steps=12, rows_per_batch=3, tokens_per_batch=0,
    )  # fmt: skip
    train(recipe, tmp_path / "out")
    losses = log(tmp_path / "out" / "01-only", "loss")
    assert losses[-1] < 0.7 * losses[0]
