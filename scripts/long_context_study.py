"""Trains a small decoder to retrieve in short rows, then asks it in long ones, by every way to extend a decoder.

python scripts/long_context_study.py --output build/long_context [--steps 4000] [--lengths 1024 2048 4096 8192]
    [--methods plain linear yarn longrope dual_chunk dual_chunk_temperature] [--questions 200] [--depths 5]

A run that was stopped goes on: training from its last save, the questions from the first cell that has no answer. The
length of training rows doubles when answers are right (`--right`), up to `--train-length`. Writes `training.jsonl`,
`results.json` (a cell: method, task, length, depth, asked, right) and `table.md`.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from retrieval_tasks import ANSWER, IGNORED, PAD, TASKS, VOCABULARY, prompt_at, training_row
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration

METHODS = ("plain", "linear", "yarn", "longrope", "dual_chunk", "dual_chunk_temperature")
PREFILL = 4096


@dataclass(frozen=True)
class Study:
    """The decoder's shape and the length of its training."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    train_length: int = 1024


def method_config(study: Study, method: str, length: int) -> MixLoraConfig:
    """The config by which a trained decoder reads rows of `length` tokens.

    Raises:
        ValueError: the method is not one of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    trained = study.train_length
    factor = max(length / trained, 1.0)
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": study.width,
        "intermediate_size": 3 * study.width,
        "num_hidden_layers": study.layers,
        "num_attention_heads": study.heads,
        "max_position_embeddings": trained,
        "pad_token_id": PAD,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if method in ("linear", "yarn") and factor > 1:
        rope |= {"rope_type": method, "factor": factor, "original_max_position_embeddings": trained}
    if method == "longrope" and factor > 1:  # slow frequencies stretched, fast ones left, as LongRoPE's search finds
        half = study.width // study.heads // 2
        long = [factor ** (i / max(half - 1, 1)) for i in range(half)]
        rope |= {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": long}
        rope |= {"factor": factor, "original_max_position_embeddings": trained}
    if method == "longrope":
        text["max_position_embeddings"] = length
    if method.startswith("dual_chunk"):
        sizes = {"chunk_size": trained, "local_size": trained // 8}
        text["long_context"] = {"method": "dual_chunk", "temperature": method.endswith("temperature"), **sizes}
    return MixLoraConfig(text_config=text | {"rope_parameters": rope})


def batch_of(step: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels `[rows, length]` of a step: the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(1_000_003 * (step + 1))
    made = [training_row(TASKS[row % len(TASKS)], length, generator) for row in range(rows)]
    return torch.tensor([ids for ids, _ in made]), torch.tensor([labels for _, labels in made])


class Training:
    """A decoder in training, with what is needed to go on: optimizer, step, and the length of its rows."""

    def __init__(self, study: Study, options: argparse.Namespace):
        torch.manual_seed(0)
        self.options, self.folder = options, options.output / "decoder"
        self.model = MixLoraForConditionalGeneration(method_config(study, "plain", study.train_length)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, weight_decay=0.01)
        self.step, self.length, self.final = 0, min(options.first_length, study.train_length), study.train_length
        self.right: list[float] = []

    def learn(self) -> dict[str, Any]:
        """One step; gives its line of the log."""
        warm, left = self.step / 100, 1 - self.step / self.options.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * min(1.0, warm + 0.01, left / 0.2)
        ids, labels = batch_of(self.step, self.options.rows * self.final // self.length, self.length)
        outputs = self.model(ids, labels=labels, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        taught = labels[:, 1:] != IGNORED
        right = float((outputs.logits[:, :-1].argmax(-1) == labels[:, 1:])[taught].float().mean())
        line = {"step": self.step, "length": self.length, "loss": float(outputs.loss.detach()), "right": right}
        self.right = [*self.right, right][-20:]
        if self.length < self.final and len(self.right) == 20 and sum(self.right) / 20 > self.options.right:
            self.length, self.right = min(2 * self.length, self.final), []
        self.step += 1
        return line

    def save(self) -> None:
        """Writes weights, the optimizer's state and the counters."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in self.model.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{names[i]}/{key}": value for i, values in state.items() for key, value in values.items()}
        tensors |= {f"{name}/weight": value.detach() for name, value in self.model.named_parameters()}
        partial = self.folder / "partial.safetensors"
        counters = {"step": self.step, "length": self.length, "right": self.right}
        save_file(tensors, partial, metadata={"counters": json.dumps(counters)})
        partial.replace(self.folder / "training.safetensors")  # so that a kill leaves a whole file

    def resume(self) -> None:
        """Goes on from what `save` wrote, if it did."""
        file = self.folder / "training.safetensors"
        if not file.is_file():
            return
        with safe_open(file, "pt") as opened:
            counters = json.loads(opened.metadata()["counters"])
        self.step, self.length, self.right = counters["step"], counters["length"], counters["right"]
        tensors = load_file(file)
        state: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.model.named_parameters()):
                parameter.copy_(tensors[f"{name}/weight"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                state[i] = {key: tensors[f"{name}/{key}"] for key in keys if f"{name}/{key}" in tensors}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def train(study: Study, options: argparse.Namespace) -> MixLoraForConditionalGeneration | None:
    """The trained decoder; None where the run is to stop before."""
    training, log = Training(study, options), options.output / "training.jsonl"
    training.resume()
    lines = log.read_text(encoding="utf-8").splitlines()[: training.step] if log.is_file() else []
    while training.step < options.steps:
        if options.stop_after is not None and training.step >= options.stop_after:
            return None
        lines.append(json.dumps(training.learn()))
        if training.step % options.save_every == 0 or training.step == options.steps:
            training.save()
            log.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(lines[-1], flush=True)
    return training.model.eval()


@torch.no_grad()
def ask(
    model: MixLoraForConditionalGeneration, task: str, length: int, depth: float, questions: int
) -> tuple[int, int]:
    """Questions asked, and answers that are right in every digit. A prompt is read once for all its questions."""
    generator = torch.Generator().manual_seed(hash((TASKS.index(task), length, round(100 * depth))) % 2**31)
    asked = right = 0
    while asked < questions:
        prompt = prompt_at(task, length, depth, min(questions - asked, 20), generator)
        cache = DynamicCache(config=model.config.text_config)
        for piece in torch.tensor([prompt.ids]).split(PREFILL, dim=1):
            model(piece, past_key_values=cache, row_lengths=torch.tensor([length]), logits_to_keep=1)
        for question, answer in prompt.questions:
            ids = torch.tensor([question + answer[:-1]])
            found = model(ids, past_key_values=cache, logits_to_keep=ANSWER).logits[0].argmax(-1).tolist()
            cache.crop(-ids.shape[1])
            asked, right = asked + 1, right + (found == answer)
    return asked, right


def evaluate(
    model: MixLoraForConditionalGeneration, study: Study, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every cell, those of an earlier run as they are."""
    file = options.output / "results.json"
    cells = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    done = {(cell["method"], cell["task"], cell["length"], cell["depth"]) for cell in cells}
    depths = [round(i / max(options.depths - 1, 1), 3) for i in range(options.depths)]
    state = model.state_dict()
    for length in options.lengths:
        room = length - options.evaluate_last  # questions come behind the prompt
        for method in options.methods:
            reader = MixLoraForConditionalGeneration(method_config(study, method, length)).eval()
            reader.load_state_dict(state)
            for task in TASKS:
                for depth in depths:
                    if (method, task, length, depth) in done:
                        continue
                    asked, right = ask(reader, task, room, depth, options.questions)
                    cells.append({"method": method, "task": task, "length": length, "depth": depth})
                    cells[-1] |= {"asked": asked, "right": right}
                    file.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
                    print(json.dumps(cells[-1]), flush=True)
    return cells


def table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table: right answers in percent by task, method and length, over all depths."""
    lengths = sorted({cell["length"] for cell in cells})
    lines = ["| task | method | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for task in TASKS:
        for method in dict.fromkeys(cell["method"] for cell in cells):
            shown = []
            for length in lengths:
                mine = [c for c in cells if (c["task"], c["method"], c["length"]) == (task, method, length)]
                asked = sum(cell["asked"] for cell in mine)
                shown.append(f"{100 * sum(cell['right'] for cell in mine) / asked:.1f}" if asked else "-")
            lines.append(f"| {task} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Trains, asks, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--rows", type=int, default=8, help="rows of a step at the final length; shorter ones are more"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--first-length", type=int, default=64)
    parser.add_argument("--right", type=float, default=0.9, help="share of right digits at which rows get longer")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--stop-after", type=int, help="stop training at this step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--questions", type=int, default=200, help="of each cell, at least")
    parser.add_argument("--evaluate-last", type=int, default=8, help="tokens of a length that the question takes")
    for name, default in asdict(Study()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    study = Study(**{name: getattr(options, name) for name in asdict(Study())})
    model = train(study, options)
    if model is None:
        return
    text = table(evaluate(model, study, options))
    (options.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
