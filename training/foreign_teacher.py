"""A teacher of another class: any transformers multimodal model whose tokenizer has the student's tokens.

Its own processor makes its own prompt of the same messages and media, with its own template and placeholders. The
answer's token ids are the student's, so the two are aligned by the places that predict labelled tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedConfig

from mixlora.training.data.collate import Example
from mixlora.training.data.rows import RowError
from mixlora.training.loaded import no_checkpoint
from mixlora.training.objectives import IGNORED, response_mask
from mixlora.training.stages import RecipeError


class ForeignTeacher:
    """Its model, frozen, and the rows of its head that the student has too.

    It sees one row at a time: many models' rows depend on those beside them, and on padding.
    """

    is_cut = True

    def __init__(self, model: Any, head: torch.Tensor):
        self.model, self.head = model.eval().requires_grad_(False), head

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any], teacher_inputs: Any = None) -> torch.Tensor:
        """`[batch, length, width]`: its states at the student's places that predict labelled tokens, 0 elsewhere.

        Args:
            teacher_inputs: of each row its inputs, its places, and the student's (see [`ForeignPrompts`]).
        """
        shape = (*inputs["input_ids"].shape, self.head.shape[1])
        states = torch.zeros(shape, dtype=self.head.dtype, device=self.head.device)
        for row, (theirs, places, ours) in enumerate(teacher_inputs):
            if not len(places):  # a row that is run, but teaches nothing
                continue
            found = last_states(self.model, send_to_device(theirs, self.model.device))[0]
            states[row, ours.to(states.device)] = found[places.to(found.device)].to(states)
        return states


def last_states(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Final normed hidden states `[batch, length, width]` of a transformers model."""
    if model.base_model is not model:
        outputs = model.base_model(**inputs, use_cache=False)
    else:  # no base to call: its hidden states end with the normed ones
        outputs = model(**inputs, use_cache=False, output_hidden_states=True)
    found = getattr(outputs, "last_hidden_state", None)
    states: torch.Tensor = outputs.hidden_states[-1] if found is None else found
    return states


class ForeignPrompts:
    """What a collator gives a foreign teacher of the same examples.

    Args:
        processor: the teacher's; media: the student's, for the views of files.
    """

    def __init__(self, processor: Any, media: Any):
        self.processor, self.augmenter = processor, media.augmenter
        self.as_parts = "type" in (processor.chat_template or "")
        self.settings = processor.to_dict() | {"chat_template": processor.chat_template}

    def __call__(self, examples: Sequence[Example]) -> list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
        """Of each example: inputs `[1, length]`, and as many places, LongTensors, the teacher's and the student's."""
        return [self._row(example) for example in examples]

    def _row(self, example: Example) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        ours = response_mask(example.labels[None])[0].nonzero()[:, 0]
        if example.messages is None or not len(ours):  # plain text, the same tokens; or nothing to learn
            ids = example.ids[None]
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ours, ours
        messages = self._messages(example)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        runs = label_runs(example.labels)
        inputs = self._prompt(messages[: answers[-1]])
        length = inputs["input_ids"].shape[1]
        places = []
        for turn, run in zip(answers[-len(runs) :], runs, strict=True):
            start = length
            if turn != answers[-1]:  # an earlier answer, as the teacher's template writes it
                start = self._prompt(messages[:turn])["input_ids"].shape[1]
                told = inputs["input_ids"][0, start : start + len(run) - 1]
                if not torch.equal(told, run[:-1]):
                    raise RowError(
                        f"the teacher's processor makes other tokens of the answer {messages[turn]['content']!r:.80}: "
                        f"{told.tolist()[:8]}, the student's {run.tolist()[:8]}"
                    )
            places.append(torch.arange(start - 1, start - 1 + len(run)))
        answer = runs[-1][None]
        inputs = {name: self._longer(name, value, answer, length) for name, value in inputs.items()}
        return inputs, torch.cat(places), ours

    @staticmethod
    def _longer(name: str, value: Any, answer: torch.Tensor, length: int) -> Any:
        """An input with the answer behind the prompt: ids, a mask, or types of tokens (0, text)."""
        if not isinstance(value, torch.Tensor) or value.shape != (1, length):
            return value
        more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}.get(name, torch.zeros_like(answer))
        return torch.cat([value, more.to(value.dtype)], dim=1)

    def _messages(self, example: Example) -> list[dict[str, Any]]:
        """The example's messages with its media in place."""
        media = {
            "image": iter([self.augmenter.picture(item) for item in example.images]),
            "audio": iter([self.augmenter.clip(item) for item in example.audio]),
        }
        messages = []
        for message in example.messages:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}] if self.as_parts else content
            else:
                content = [
                    {**part, part["type"]: next(media[part["type"]])} if part["type"] in media else part
                    for part in content
                ]
            messages.append({**message, "content": content})
        return messages

    def _prompt(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Inputs of one prompt, up to where the assistant begins."""
        return dict(
            self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                sanitize_control_tokens=True,
            )
        )  # fmt: skip


def label_runs(labels: torch.Tensor) -> list[torch.Tensor]:
    """The runs of labelled tokens of `labels` `[length]`, one an answer, its end token included."""
    places = (labels != IGNORED).nonzero()[:, 0]
    cuts = (places.diff() > 1).nonzero()[:, 0] + 1
    return [labels[run] for run in places.tensor_split(cuts)]


def load_foreign(name: str, processor: Any, media: Any, student: Any) -> tuple[ForeignTeacher, ForeignPrompts]:
    """A teacher from a folder or a hub id, checked against the student's processor.

    Of both heads the rows that both have are compared, where their vocabularies are padded to other sizes.

    Raises:
        RecipeError: no multimodal model; other tokens; no chat template; or logits that are not its head's product
            with its last hidden states.
    """
    try:
        model = AutoModelForMultimodalLM.from_pretrained(name, dtype=torch.float32).to(student.device)
        theirs = AutoProcessor.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise RecipeError(f"teacher {name}: neither ours nor a transformers multimodal model ({error})") from error
    if not getattr(theirs, "chat_template", None):
        raise RecipeError(f"teacher {name}: its processor has no chat template")
    check_tokens(processor, theirs, name)
    check_head(model, name)
    head = model.get_output_embeddings().weight[: student.config.text_config.vocab_size]
    vocabulary = len(processor.tokenizer)
    if len(head) < vocabulary:
        raise RecipeError(f"teacher {name}: its head has {len(head)} tokens, the student's tokenizer {vocabulary}")
    ours, end = processor.tokenizer.convert_tokens_to_ids("<|end|>"), end_token(theirs)
    if ours != end:  # what it gives to its own end counts for the student's
        head = head.detach().clone()
        head[[ours, end]] = head[[end, ours]]
    return ForeignTeacher(model, head), ForeignPrompts(theirs, media)


def check_tokens(processor: Any, teacher_processor: Any, name: str) -> None:
    """Raises RecipeError where one of the student's tokens, placeholders aside, has another id in the teacher."""
    ours, theirs = (each.tokenizer.get_vocab() for each in (processor, teacher_processor))
    for placeholder in (processor.image_token, processor.audio_token):
        ours.pop(placeholder, None)
    if differ := sorted(token for token in ours if ours[token] != theirs.get(token)):
        shown = ", ".join(f"{token!r} {ours[token]} here, {theirs.get(token)} there" for token in differ[:5])
        raise RecipeError(f"teacher {name}: {len(differ)} tokens have other ids than the student's: {shown}")


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Raises RecipeError where logits are more than the head times the last states (a bias, a scale, a cap)."""
    ids = torch.arange(2, 10, device=model.device)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    product = last_states(model, inputs) @ model.get_output_embeddings().weight.T
    if not torch.allclose(product, logits.to(product), rtol=1e-3, atol=1e-3 * float(logits.std())):
        raise RecipeError(f"teacher {name}: its logits are not its head times its last hidden states")


def end_token(processor: Any) -> int:
    """The token by which a processor's template ends an answer; the tokenizer's own where it writes none."""
    text = [{"type": "text", "text": "a"}] if "type" in processor.chat_template else "a"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    prompt, whole = (
        processor.apply_chat_template(
            turns[:count], add_generation_prompt=count == 1, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"][0].tolist()
        for count in (1, 2)
    )
    answer = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    ends = whole[len(prompt) + len(answer) :]
    end: int = ends[0] if ends else processor.tokenizer.eos_token_id
    return end


def is_ours(name: str) -> bool:
    """Whether a checkpoint loads as a mixlora model, Phi-4-Multimodal's layouts included.

    Raises:
        RecipeError: there is none of that name.
    """
    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except OSError as error:
        raise no_checkpoint(name, "teacher", error) from error
    return kind in ("mixlora", "phi4mm", "phi4_multimodal")
