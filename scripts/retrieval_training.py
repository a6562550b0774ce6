"""The training of the study's decoder: from short rows to longer ones, by answers and by where idle tokens look."""

import argparse
import json
import math
from typing import Any

import torch
from retrieval_reader import Reader, Study
from retrieval_tasks import FEWEST, NAMES, TASKS, Rows, make_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

TEXT = tuple(name for name, task in TASKS.items() if task.media is None)
IDLE = 64
"""Tokens of a row that are asked where they rest, at most."""


def idle_tokens(rows: list[Rows], count: int, generator: torch.Generator) -> torch.Tensor:
    """Places `[rows, count]` of tokens that tell no answer, any of them but the first of the row."""
    chance = torch.rand(len(rows), rows[0].ids.shape[1], generator=generator)
    chance[:, 0] = -1
    for row, each in enumerate(rows):
        chance[row, each.asked - 1] = -1
    return chance.topk(count).indices


def unrest(scores: torch.Tensor, idle: torch.Tensor, crowd: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How far tokens that need nothing are from resting on their row's first token, where a real decoder's heads rest.

    A head that looks for facts is idle at most tokens. Nothing tells it where to look then, and in a longer row it
    would look at other keys from each token, which no choice of keys for many tokens can foresee.

    Args:
        scores: `[rows, heads, count, keys]`, of heads that look for facts.
        idle: `[rows, count]`, the places of these tokens.
        crowd: how many times as many other keys a token shall be able to meet.

    Returns:
        the loss `-log w`, where w is the weight of the first token with `crowd` times the other keys, over tokens and
        heads; and the mean of the weight itself, without the crowd.
    """
    later = torch.arange(scores.shape[-1]) > idle[:, None, :, None]
    others = scores[..., 1:].masked_fill(later[..., 1:], -torch.inf).logsumexp(-1) - scores[..., 0]
    return nn.functional.softplus(others + math.log(crowd)).mean(), torch.sigmoid(-others.detach()).mean()


class FullMuon(torch.optim.Muon):
    """Muon in fp32: where a processor has no bf16, the orthogonalization of torch's own takes most of a step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step; weight decay is left out, and the rate is matched with AdamW's."""
        for group in self.param_groups:
            momentum, (a, b, c) = group["momentum"], group["ns_coefficients"]
            for weight in group["params"]:
                held = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                held.lerp_(weight.grad, 1 - momentum)
                x = weight.grad.lerp(held, momentum)
                x = x / x.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):
                    square = x @ x.T
                    x = a * x + (b * square + c * square @ square) @ x
                weight.add_(x, alpha=-0.2 * group["lr"] * max(weight.shape) ** 0.5)


class Training:
    """A decoder in training, with what is needed to go on: optimizer, step, and the length of its rows."""

    def __init__(self, study: Study, options: argparse.Namespace):
        torch.manual_seed(0)
        self.options, self.folder = options, options.output / "decoder"
        self.reader = Reader(study, {}).train()
        self.reader.begin()
        rate, betas = options.learning_rate, (0.9, 0.98)
        layers = self.reader.model.model.language_model.layers
        matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
        others = [weight for weight in self.reader.model.parameters() if all(weight is not each for each in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            FullMuon(matrices, lr=rate),
            torch.optim.AdamW(others, lr=rate, betas=betas),
        ]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step, self.length, self.final = 0, min(options.first_length, study.train_length), study.train_length
        self.right: list[float] = []

    def length_now(self) -> int:
        """Tokens of the rows of this step: every fourth step has shorter ones, which would else be forgotten."""
        shorter = 1 + self.step // 4 % 3 if self.step % 4 == 3 else 0
        return max(self.length >> shorter, min(self.options.first_length, self.length))

    def batch(self) -> tuple[list[Rows], list[str]]:
        """Rows of a step and their tasks: the same whenever they are asked for."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.step + 1))
        length = self.length_now()
        count = max(self.options.tokens // length, len(TEXT))
        names = [TEXT[(self.step + row) % len(TEXT)] for row in range(count)]
        most = max(length // 8 / FEWEST, 1.0)  # from few facts to many, as many rows of each
        facts = [int(FEWEST * most ** float(torch.rand((), generator=generator))) for _ in names]
        # Half of the rows draw on few names: in longer rows each key has as many that share a name with it.
        pools = [
            math.ceil((2 * each) ** 0.5) if torch.rand((), generator=generator) < 0.5 else NAMES for each in facts
        ]
        rows = [make_rows(name, 1, length, generator, *each) for name, *each in zip(names, facts, pools, strict=True)]
        return rows, names

    def learn(self) -> dict[str, Any]:
        """One step; gives its line of the log."""
        left = 1 - self.step / self.options.steps
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min((self.step + 1) / 100, left)
        length = self.length_now()
        rows, names = self.batch()
        generator = torch.Generator().manual_seed(self.step)
        idle = idle_tokens(rows, min(IDLE, length // 2), generator)
        hidden, scores = self.reader.read(torch.cat([each.ids for each in rows]), idle)
        taught = torch.cat([hidden[row, each.asked - 1] for row, each in enumerate(rows)])
        answers = torch.cat([each.answers[0] for each in rows])
        logits = self.reader.model.lm_head(taught)
        loss = nn.functional.cross_entropy(logits, answers)
        restless, first = unrest(scores, idle, self.options.crowd)
        resting = self.length > self.options.first_length  # before that it would keep heads from finding anything
        (loss + self.options.rest * restless if resting else loss).backward()
        nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found = (logits.argmax(-1) == answers).float().split([len(each.asked) for each in rows])
        by_task = {
            task: [float(f.mean()) for f, name in zip(found, names, strict=True) if name == task] for task in TEXT
        }
        right = sum(map(sum, by_task.values())) / len(rows)
        line = {
            "step": self.step,
            "length": length,
            "loss": round(float(loss.detach()), 4),
            "right": round(right, 4),
            "first": round(float(first), 4),
            "unrest": round(float(restless.detach()), 4),
        }
        line |= {task: round(sum(each) / len(each), 3) for task, each in by_task.items() if each}
        self.right = [*self.right, right][-20:]
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


def train(study: Study, options: argparse.Namespace) -> Reader | None:
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
    return training.reader.eval()
