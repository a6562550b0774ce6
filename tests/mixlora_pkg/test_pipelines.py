"""transformers' pipelines take a checkpoint by its path, and answer what the model answers."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor
from tests.training.training_fixtures import make_start

QUESTION = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_start(tmp_path_factory.mktemp("start"))


def media() -> tuple[Image.Image, np.ndarray]:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (9, 7), dtype=np.uint8))
    return picture, generator.normal(0, 0.1, 5000).astype(np.float32)


def conversation(kinds: str) -> list[dict[str, Any]]:
    picture, clip = media()
    parts = {"i": {"type": "image", "image": picture}, "a": {"type": "audio", "audio": clip, "sampling_rate": 16000}}
    return [{"role": "user", "content": [*(parts[kind] for kind in kinds), QUESTION]}]


@torch.no_grad()
def answer(start: str, chat: list[dict[str, Any]]) -> str:
    """What the model itself says."""
    model = MixLoraForConditionalGeneration.from_pretrained(start).eval()
    processor = MixLoraProcessor.from_pretrained(start)
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("task, kinds", [("any-to-any", ["", "i", "a", "ia"]), ("image-text-to-text", ["", "i"])])
def test_a_pipeline_answers_a_chat(task: str, kinds: list[str], start: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        pipe = pipeline(task, model=start)
    assert "not supported" not in caplog.text
    assert isinstance(pipe.model, MixLoraForConditionalGeneration)
    for kind in kinds:
        chat = conversation(kind)
        found = pipe(text=chat, max_new_tokens=8, return_full_text=False, generate_kwargs={"do_sample": False})
        assert found[0]["generated_text"] == answer(start, chat), kind


def test_a_pipeline_answers_several_chats(start: str) -> None:
    pipe = pipeline("any-to-any", model=start)
    chats = [conversation(kind) for kind in ("i", "", "a")]
    options = {"max_new_tokens": 8, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    found = pipe(text=chats, **options)
    assert [each[0]["generated_text"] for each in found] == [answer(start, chat) for chat in chats]


def test_a_pipeline_takes_text_with_a_placeholder_and_a_picture(start: str) -> None:
    picture, _ = media()
    pipe = pipeline("image-text-to-text", model=start)
    found = pipe(images=picture, text="<|image|>What is it?", max_new_tokens=4, return_full_text=False)
    model, processor = pipe.model, pipe.processor
    inputs = processor(images=picture, text="<|image|>What is it?")
    with torch.no_grad():
        wanted = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert found[0]["generated_text"] == processor.decode(wanted, skip_special_tokens=True)
