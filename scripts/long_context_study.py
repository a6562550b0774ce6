"""Trains a small decoder to retrieve in rows of 1,024 tokens, then asks it in longer ones, by each way to extend it.

python scripts/long_context_study.py --output build/long_context

The tasks are those of `retrieval_tasks.py`; digits to see and hear come from the embedded checkpoint's towers and
projectors (`retrieval_media.py`, which needs the rows of prepare_pictures.py and prepare_speech.py) and take a linear
layer that is trained along. A run that was stopped goes on: training from its last save, the questions from the first
that was not asked. The length of training rows doubles when answers are right (`--right`), up to `--train-length`.
Writes `training.jsonl`, `results.json` (of a method, task and length: asked and right by fifths of the row),
`table.md` and heat maps of the tasks.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from long_context_results import DEPTHS, Cell, heat_maps, table
from retrieval_media import Media, load_media
from retrieval_tasks import AUDIO, FEWEST, IMAGE, PAD, TASKS, VOCABULARY, Rows, make_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.media_encoding import MediaOutput
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration

METHODS = ("plain", "linear", "yarn", "longrope", "dual_chunk", "dual_chunk_temperature")
FAR_METHODS = ("plain", "dual_chunk", "dual_chunk_temperature")
THETA = 10000.0
BACK, MARGIN = (1, 2), 8.0
"""How far the first heads look back, and how much all other scores are below."""
EMBEDDING = 0.7
TOKENS_AT_ONCE = 8192
Parts = dict[str, dict[str, Media]]


@dataclass(frozen=True)
class Study:
    """The decoder's shape and the length of its training."""

    width: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
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
        "intermediate_size": study.width,
        "num_hidden_layers": study.layers,
        "num_attention_heads": study.heads,
        "head_dim": study.head_dim,
        "max_position_embeddings": trained,
        "attention_bias": True,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": THETA}
    if method in ("linear", "yarn") and factor > 1:
        rope |= {"rope_type": method, "factor": factor, "original_max_position_embeddings": trained}
    if method == "longrope" and factor > 1:  # slow frequencies stretched, fast ones left, as LongRoPE's search finds
        half = study.head_dim // 2
        long = [factor ** (i / max(half - 1, 1)) for i in range(half)]
        rope |= {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": long}
        rope |= {"factor": factor, "original_max_position_embeddings": trained}
    if method == "longrope":
        text["max_position_embeddings"] = length
    if method.startswith("dual_chunk"):
        sizes = {"chunk_size": trained, "local_size": trained // 8}
        text["long_context"] = {"method": "dual_chunk", "temperature": method.endswith("temperature"), **sizes}
    media = {"image_token_id": IMAGE, "audio_token_id": AUDIO, "tie_word_embeddings": False}
    routing = dict.fromkeys(("vision", "speech", "vision_speech"))
    return MixLoraConfig(text_config=text | {"rope_parameters": rope}, routing=routing, **media)


class Reader(nn.Module):
    """The decoder, and a layer for what is seen and one for what is heard."""

    def __init__(self, study: Study, media: Parts, method: str = "plain", length: int = 1):
        super().__init__()
        self.model = MixLoraForConditionalGeneration(method_config(study, method, length))
        sizes = {task: parts["train"].vectors.shape[1] for task, parts in media.items()}
        self.projectors = nn.ModuleDict({task: nn.Linear(size, study.width) for task, size in sizes.items()})

    def forward(self, ids: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states `[rows, length, width]`.

        Args:
            ids: `[rows, length]`.
            vectors: `[items, size]` of all pictures, and of all clips, in order of appearance.
        """
        kinds = {"picture": "image", "speech": "audio"}
        shown = {
            kinds[task]: MediaOutput(pooler_output=[self.projectors[task](each)]) for task, each in vectors.items()
        }
        return self.model.model(ids, mm_encoder_outputs=shown or None, use_cache=False).last_hidden_state

    @torch.no_grad()
    def begin(self) -> None:
        """Embeddings as large as what layers add, and two heads of the first layer that look one and two tokens back.

        Biases of q and k that are a rotation by so many positions apart do so. A decoder of this size finds such heads
        by itself, but in many more steps than all the rest takes.
        """
        nn.init.normal_(self.model.model.language_model.embed_tokens.weight, std=EMBEDDING)
        attention: Any = self.model.model.language_model.layers[0].self_attn
        half = attention.head_dim // 2
        angles = THETA ** (-torch.arange(half) / half)
        for head, back in enumerate(BACK):
            scores = (torch.arange(1, 1024)[:, None] * angles).cos().sum(1)  # by how far a key is from the one wanted
            strength = (MARGIN / float(half - scores.max()) / attention.scaling) ** 0.5
            mine = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            turned = torch.cat(((back * angles).cos(), -(back * angles).sin()))
            attention.q_proj.base_layer.weight[mine] = 0.0  # what stands there says nothing, only how far it is
            attention.k_proj.base_layer.weight[mine] = 0.0
            attention.q_proj.base_layer.bias[mine] = strength * turned
            attention.k_proj.base_layer.bias[mine] = strength * torch.cat((torch.ones(half), torch.zeros(half)))


def drawn(rows: list[Rows], names: list[str], media: Parts, part: str, generator: torch.Generator) -> dict[str, Any]:
    """The vectors of all rows' digits, see [`Reader`]."""
    found: dict[str, list[torch.Tensor]] = {}
    for each, name in zip(rows, names, strict=True):
        if each.digits is not None:
            found.setdefault(name, []).append(media[name][part].draw(each.digits, generator).flatten(0, 1))
    return {name: torch.cat(vectors) for name, vectors in found.items()}


class Training:
    """A decoder in training, with what is needed to go on: optimizer, step, and the length of its rows."""

    def __init__(self, study: Study, options: argparse.Namespace, media: Parts):
        torch.manual_seed(0)
        self.options, self.folder, self.media = options, options.output / "decoder", media
        self.reader = Reader(study, media).train()
        self.reader.begin()
        rate, betas = options.learning_rate, (0.9, 0.98)
        layers, projectors = self.reader.model.model.language_model.layers, list(self.reader.projectors.parameters())
        matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
        others = [weight for weight in self.reader.model.parameters() if all(weight is not each for each in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=betas),
            torch.optim.AdamW(projectors, lr=rate / 10, betas=betas),  # what they take is much larger
        ]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step, self.length, self.final = 0, min(options.first_length, study.train_length), study.train_length
        self.right: list[float] = []

    def batch(self) -> tuple[list[Rows], list[str], dict[str, Any]]:
        """Rows of a step, their tasks and their vectors: the same whenever they are asked for."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.step + 1))
        count = max(self.options.tokens // self.length, len(TASKS))
        names = [tuple(TASKS)[(self.step + row) % len(TASKS)] for row in range(count)]
        most = max(self.length // 8 / FEWEST, 1.0)  # from few facts to many, as many rows of each
        facts = [int(FEWEST * most ** float(torch.rand((), generator=generator))) for _ in names]
        rows = [make_rows(name, 1, self.length, generator, each) for name, each in zip(names, facts, strict=True)]
        return rows, names, drawn(rows, names, self.media, "train", generator)

    def learn(self) -> dict[str, Any]:
        """One step; gives its line of the log."""
        left = 1 - self.step / self.options.steps
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min((self.step + 1) / 100, left)
        rows, names, vectors = self.batch()
        hidden = self.reader(torch.cat([each.ids for each in rows]), vectors)
        taught = torch.cat([hidden[row, each.asked - 1] for row, each in enumerate(rows)])
        answers = torch.cat([each.answers[0] for each in rows])
        logits = self.reader.model.lm_head(taught)
        loss = nn.functional.cross_entropy(logits, answers)
        loss.backward()
        nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found = (logits.argmax(-1) == answers).float().split([len(each.asked) for each in rows])
        by_task = {
            task: [float(f.mean()) for f, name in zip(found, names, strict=True) if name == task] for task in TASKS
        }
        right = sum(map(sum, by_task.values())) / len(rows)
        line = {
            "step": self.step,
            "length": self.length,
            "loss": round(float(loss.detach()), 4),
            "right": round(right, 4),
        }
        line |= {task: round(sum(each) / len(each), 3) for task, each in by_task.items() if each}
        shown = [sum(by_task[task]) / len(by_task[task]) for task in TASKS if TASKS[task].media is None]
        self.right = [*self.right, sum(shown) / len(shown)][-20:]  # digits are learnt more slowly
        if self.length < self.final and len(self.right) == 20 and sum(self.right) / 20 > self.options.right:
            self.length, self.right = min(2 * self.length, self.final), []
        self.step += 1
        return line

    def save(self) -> None:
        """Writes weights, the optimizer's state and the counters."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}/weight": value.detach() for name, value in self.reader.named_parameters()}
        for optimizer in self.optimizers:
            for name, parameter in self.reader.named_parameters():
                tensors |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
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
        holder = {weight: each for each in self.optimizers for weight in each.param_groups[0]["params"]}
        for name, parameter in self.reader.named_parameters():
            parameter.data.copy_(tensors.pop(f"{name}/weight"))
            keys = [key for key in tensors if key.startswith(f"{name}/")]
            holder[parameter].state[parameter] = {key.removeprefix(f"{name}/"): tensors[key] for key in keys}


def train(study: Study, options: argparse.Namespace, media: Parts) -> Reader | None:
    """The trained decoder; None where the run is to stop before."""
    training, log = Training(study, options, media), options.output / "training.jsonl"
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
    return training.reader.eval()


@torch.no_grad()
def ask(reader: Reader, media: Parts, task: str, length: int, questions: int) -> tuple[list[int], list[int]]:
    """Questions asked about each fifth of the row, at least `questions`, and how many of the answers are right."""
    generator = torch.Generator().manual_seed(1_000 * length + list(TASKS).index(task))
    asked, right = torch.zeros(DEPTHS, dtype=torch.long), torch.zeros(DEPTHS, dtype=torch.long)
    while int(asked.min()) < questions:
        rows = make_rows(task, max(TOKENS_AT_ONCE // length, 1), length, generator)
        hidden = reader(rows.ids, drawn([rows], [task], media, "test", generator))
        correct = reader.model.lm_head(hidden[:, rows.asked - 1]).argmax(-1) == rows.answers
        fifth = (rows.depth * DEPTHS).long()
        asked += fifth.flatten().bincount(minlength=DEPTHS)
        right += fifth[correct].bincount(minlength=DEPTHS)
    return asked.tolist(), right.tolist()


def evaluate(trained: Reader, study: Study, options: argparse.Namespace, media: Parts) -> list[Cell]:
    """Every cell, those of an earlier run as they are."""
    file = options.output / "results.json"
    cells: list[Cell] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    done = {(cell["method"], cell["task"], cell["length"]) for cell in cells}
    for length in options.lengths:
        for method in options.methods:
            if method not in FAR_METHODS and not study.train_length < length <= options.far:
                continue  # up to the length of training they are the plain decoder
            reader = Reader(study, media, method, length).eval()
            reader.load_state_dict(trained.state_dict())
            for task in TASKS:
                if (method, task, length) in done:
                    continue
                started = time.perf_counter()
                asked, right = ask(reader, media, task, length, options.questions)
                cells.append({"method": method, "task": task, "length": length, "asked": asked, "right": right})
                file.write_text("[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n", encoding="utf-8")
                print(json.dumps(cells[-1]), f"{time.perf_counter() - started:.1f} s", flush=True)
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Trains, asks, and writes the table and the heat maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--media", type=Path, help="vectors of digits; by default a file of the output, encoded once")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step; at least a row of each task")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--first-length", type=int, default=64)
    parser.add_argument("--right", type=float, default=0.9, help="share of right answers at which rows get longer")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--stop-after", type=int, help="stop training at this step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--far", type=int, default=8192, help=f"longer rows are read by {', '.join(FAR_METHODS)} alone"
    )
    parser.add_argument("--questions", type=int, default=200, help="of each cell, at least")
    for name, default in asdict(Study()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    study = Study(**{name: getattr(options, name) for name in asdict(Study())})
    media = load_media(options.media or options.output / "media.safetensors")
    trained = train(study, options, media)
    if trained is None:
        return
    trained.model.save_pretrained(options.output / "decoder")  # for benchmarks/sparse_retrieval.py
    cells = evaluate(trained, study, options, media)
    (options.output / "table.md").write_text(table(cells, tuple(TASKS)), encoding="utf-8")
    heat_maps(cells, tuple(TASKS), options.output)
    print(table(cells, tuple(TASKS)))


if __name__ == "__main__":
    main()
