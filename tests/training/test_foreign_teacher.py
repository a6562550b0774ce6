"""A teacher of another class: a tiny LLaVA of transformers, with its own processor, template and placeholders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mixlora.modeling.image_processing_mixlora import load_picture
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import read_rows
from mixlora.training.foreign_teacher import check_head, load_foreign
from mixlora.training.objectives import response_mask
from mixlora.training.stages import RecipeError
from mixlora.training.train import train
from tests.modeling.model_fixtures import make_loud
from tests.modeling.processor_fixtures import tiny_tokenizer
from tests.training.taught_fixtures import load, log
from tests.training.training_fixtures import chat, write_recipe

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|endoftext|>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_llava(folder: Path) -> str:
    """Its answers end by another token than the student's; the id of its placeholder is none of the student's."""
    torch.manual_seed(3)
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 5, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=len(tokenizer) - 1, image_seq_length=9)
    make_loud(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=12)
    LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture
def llava(tmp_path: Path) -> str:
    return write_llava(tmp_path / "llava")


@pytest.fixture
def seen(rows: Path) -> Path:
    """Plain text, a picture, text alone, two turns, and an answer that stands in its own prompt."""
    path = rows.with_name("seen.jsonl")
    lines: list[dict[str, Any]] = [{"text": "the quick brown fox"}, chat("i", "yes", 1), chat("", "no way", 2)]
    lines.append({"messages": chat("i", "a cat", 5)["messages"] + chat("", "a dog", 0)["messages"]})
    lines.append({"messages": [{"role": "user", "content": "say hm"}, {"role": "assistant", "content": "hm"}]})
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def prepared(start: str, path: Path, teacher: str) -> tuple[Any, dict[str, Any]]:
    processor, model = MixLoraProcessor.from_pretrained(start), load(start)
    media = Media(model, processor)
    examples = Tokenizer(processor, media, 512)(read_rows(path))
    collator = Collator(media, processor.tokenizer.pad_token_id)
    foreign, collator.foreign = load_foreign(teacher, processor, media, model)
    return foreign, collator(examples)


def by_hand(folder: str) -> list[tuple[torch.Tensor, list[int], torch.Tensor]]:
    """Ids of each row of `seen` (text last), the places that predict an answer, and the states there."""
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        LlavaProcessor.from_pretrained(folder),
    )
    picture = {1: "1.png", 5: "5.png"}
    rows = [
        ("[user] <image>??\n[assistant] ", ["yes"], 1),
        ("[user] ???\n[assistant] ", ["no way"], 0),
        ("[user] <image>???\n[assistant] ", ["a cat", "[user] ?\n[assistant] ", "a dog"], 5),
        ("[user] say hm\n[assistant] ", ["hm"], 0),
    ]
    found = []
    for prompt, turns, number in rows:
        ids = processor.tokenizer(prompt.replace("<image>", "<image>" * 9))["input_ids"]
        places: list[int] = []
        for i, turn in enumerate(turns):
            words = processor.tokenizer(turn)["input_ids"]
            if i % 2 == 0:
                places += range(len(ids) - 1, len(ids) + len(words))
                words = [*words, 0]
            ids = [*ids, *words]
        media = {}
        if number:
            path = Path(folder).parent / picture[number]
            media["pixel_values"] = processor.image_processor(load_picture(path), return_tensors="pt")["pixel_values"]
        states = model.model(input_ids=torch.tensor([ids]), **media).last_hidden_state[0]
        found.append((torch.tensor(ids), places, states[places]))
    ids = processor.tokenizer("<|endoftext|>the quick brown fox<|endoftext|>")["input_ids"]
    states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return [*found, (torch.tensor(ids), list(range(len(ids) - 1)), states[:-1])]


@torch.no_grad()
def test_it_is_asked_in_its_own_words_and_answers_align(start: str, seen: Path, llava: str) -> None:
    foreign, inputs = prepared(start, seen, llava)
    states = foreign.hidden(inputs, inputs["teacher_inputs"])
    masks = response_mask(inputs["labels"])
    expected = by_hand(llava)
    assert len(expected) == len(states)
    for row, (_, places, wanted) in enumerate(expected):
        assert inputs["teacher_inputs"][row][1].tolist() == places
        torch.testing.assert_close(states[row][masks[row]], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_end_of_an_answer_counts_for_the_students(start: str, seen: Path, llava: str) -> None:
    foreign, _ = prepared(start, seen, llava)
    head = LlavaForConditionalGeneration.from_pretrained(llava).lm_head.weight
    end = tiny_tokenizer().convert_tokens_to_ids("<|end|>")
    assert end != 0 and torch.equal(foreign.head[end], head[0]) and torch.equal(foreign.head[0], head[end])
    assert torch.equal(foreign.head[7:], head[7:])


def test_a_student_comes_nearer_to_it(tmp_path: Path, start: str, seen: Path, llava: str) -> None:
    """Straight, and from what is kept of it on disk; both are the same training."""
    losses = []
    for name, kept in (("straight", ""), ("kept", "float32")):
        recipe = write_recipe(
            tmp_path, start, seen, ["decoder", "vision_projector", "adapter.vision"], objective="mimic", teacher=llava,
            teacher_cache=kept, max_steps=12, rows_per_batch=5, tokens_per_batch=0, mimic={"sft_weight": 0.1},
        )  # fmt: skip
        train(recipe, tmp_path / name)
        losses.append(log(tmp_path / name / "01-only", "loss"))
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_other_tokens_are_named(tmp_path: Path, start: str, llava: str) -> None:
    processor, model = MixLoraProcessor.from_pretrained(start), load(start)
    processor.tokenizer.add_tokens(["zebra"])
    with pytest.raises(RecipeError, match="1 tokens have other ids.*'zebra' 267 here, None there"):
        load_foreign(llava, processor, Media(model, processor), model)


def test_what_is_no_multimodal_model_is_named(tmp_path: Path, start: str) -> None:
    processor, model = MixLoraProcessor.from_pretrained(start), load(start)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(RecipeError, match="neither ours nor a transformers multimodal model"):
        load_foreign(str(tmp_path / "llama"), processor, Media(model, processor), model)


def test_logits_that_are_scaled_are_refused(llava: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    check_head(model, "plain")
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 30 * (logits / 30).tanh())
    with pytest.raises(RecipeError, match="not its head times its last hidden states"):
        check_head(model, "capped")


def test_answers_are_not_drawn_for_it(tmp_path: Path, start: str, seen: Path, llava: str) -> None:
    recipe = write_recipe(
        tmp_path, start, seen, ["vision_projector"], objective="mimic", teacher=llava, mimic={"on_policy": 1.0}
    )
    with pytest.raises(RecipeError, match="need a teacher of ours"):
        train(recipe, tmp_path / "out")
