"""A training step on text, image and speech rows: ours beside transformers with PEFT, a micro-batch a modality.

python -m benchmarks.training_step [--repeat 3] [--shapes full] [--quick] [--device cuda --dtype bfloat16]
    [--json FILE]

Adapters and projectors learn; decoder and towers are frozen. Both make logits where a token is labelled, and nowhere
else: forward and backward, without the optimizer. PEFT acts with one adapter at a time, so each modality is a batch of
its own, and gradients add up. Ours must give the loss and gradients of the peer row by row, where it is right.
Peak memory, over what is there before, is that of a process of its own for each way.
"""

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from benchmarks.pair import MODALITIES, Feeder, Pair, Row, build_pair
from benchmarks.shapes import VARIANTS


def freeze(pair: Pair) -> None:
    """Lets adapters and projectors learn, and nothing else."""
    for model in (pair.ours, pair.peer):
        for name, parameter in model.named_parameters():
            learns = ".lora_" in name or "projector" in name or "img_projection" in name
            learns |= any(f"{part}_proj_for_" in name for part in ("up", "down"))
            parameter.requires_grad_(learns)
        model.train()
    pair.ours.model.train()


def steps_of(pair: Pair, feeder: Feeder) -> dict[str, Callable[[], float]]:
    """Both steps, and the peer's row by row, as calls that leave gradients and give the loss."""
    import torch
    from torch.nn import functional as F

    from mixlora.training.step_supervised import SupervisedStep

    freeze(pair)
    learnt = pair.shapes.label_tokens
    rows = feeder.rows(pair.shapes.trained, label_tokens=learnt)
    inputs, calls = feeder.ours(rows, "right"), list(feeder.peer_calls(rows, "right").items())
    single = [(row.modality, feeder.peer([row], "right")) for row in rows]
    total = learnt * len(rows)

    def labels_of(batch: dict[str, Any]) -> Any:
        ends = batch["attention_mask"].sum(-1, keepdim=True)
        places = torch.arange(batch["input_ids"].shape[1], device=pair.device)
        return batch["input_ids"].masked_fill((places < ends - learnt) | (places >= ends), -100)

    inputs["labels"] = labels_of(inputs)
    step = SupervisedStep(0.0, 0, 0)

    def ours() -> float:
        pair.ours.zero_grad()
        loss, _ = step(pair.ours, inputs, total)
        loss.backward()
        return loss.item()

    def peer(batches: list[tuple[str, dict[str, Any]]]) -> float:
        pair.peer.zero_grad()
        whole = 0.0
        for modality, batch in batches:
            labels = labels_of(batch)
            where = F.pad(labels[:, 1:] != -100, (0, 1))
            with pair.acting(modality) as model:
                inner = model.base_model.model
                hidden = inner.model(**batch, use_cache=False).last_hidden_state
                logits = inner.lm_head(hidden[where]).float()
                loss = F.cross_entropy(logits, labels[:, 1:][where[:, :-1]], reduction="sum") / total
                if loss.requires_grad:  # rows of text take no adapter here
                    loss.backward()
            whole += loss.item()
        return whole

    return {"ours": ours, "peer": lambda: peer(calls), "row by row": lambda: peer(single)}


def gradients(pair: Pair) -> dict[str, dict[str, Any]]:
    """The adapters' gradients of both, by adapter and projection."""
    found: dict[str, dict[str, Any]] = {}
    for who, model in (("ours", pair.ours), ("peer", pair.peer)):
        found[who] = {
            name[name.index("layers.") :]: parameter.grad
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }
    return found


def check(pair: Pair, steps: dict[str, Callable[[], float]]) -> float:
    """The largest relative difference of a gradient, without dropout.

    Raises:
        RuntimeError: losses or gradients differ.
    """
    import torch

    for model in (pair.ours, pair.peer):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    losses = {who: steps[who]() for who in ("ours", "row by row")}
    grads = gradients(pair)
    apart = max(((grads["ours"][n] - g).norm() / g.norm()).item() for n, g in grads["peer"].items())
    most = 1e-2 if next(pair.ours.parameters()).element_size() == 4 else 0.3
    if abs(losses["ours"] - losses["row by row"]) > most * losses["ours"] or not apart < most:
        raise RuntimeError(f"losses {losses}, gradients apart by {apart:.3g}")
    freeze(pair)
    return apart


def phases(pair: Pair, steps: dict[str, Callable[[], float]]) -> dict[str, dict[str, float]]:
    """Seconds of the parts of one step, by who; `rest` is the head, the loss, and what lies between."""
    import torch

    inner, found = pair.peer.base_model.model, {}
    media = {"ours": (pair.ours.model, "encode_media"), "peer": (inner.model.embed_tokens_extend, "forward")}
    decoder = {"ours": (pair.ours.model, "_decode"), "peer": (inner.model, "forward")}
    for who in ("ours", "peer"):
        seconds: dict[str, float] = {}
        with (
            measure.watching(*media[who], seconds, "towers and projectors", pair.device),
            measure.watching(*decoder[who], seconds, "decoder, forward", pair.device),
            measure.watching(torch.Tensor, "backward", seconds, "backward", pair.device),
        ):
            whole = measure.timed(steps[who], pair.device)
        if who == "peer":  # its forward has the towers within
            seconds["decoder, forward"] -= seconds["towers and projectors"]
        found[who] = seconds | {"rest": whole - sum(seconds.values())}
    return found


def tokens_of(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Tokens that each way takes through the decoder: ours real ones, the peer's padded to its micro-batches' longest.

    Both take only rows with an adapter back.
    """
    lengths = {kind: [len(row.ids) for row in rows if row.modality == kind] for kind in MODALITIES}
    real = {kind: sum(mine) for kind, mine in lengths.items()}
    padded = {kind: len(mine) * max(mine, default=0) for kind, mine in lengths.items()}
    return {
        who: {"forward": sum(count.values()), "backward": sum(count.values()) - count["text"]}
        for who, count in (("ours", real), ("peer", padded))
    }


def peak(who: str, shapes: str, device: str, dtype: str, results: Any) -> None:
    """Puts the memory, MiB, that a step takes over what was there before on a queue."""
    import torch

    pair, feeder = (make(VARIANTS[shapes], device, dtype) for make in (build_pair, Feeder))
    steps = steps_of(pair, feeder)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps[who]()
        results.put((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    with open("/proc/self/clear_refs", "w") as file:  # the peak counts from now on
        file.write("5")
    before = resident("VmRSS")
    steps[who]()
    results.put((resident("VmHWM") - before) / 2**10)


def resident(field: str) -> int:
    """A figure of this process's memory, KiB; where /proc lacks it, the highest so far."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints seconds, tokens per second, peaks and ratios."""
    args, shapes = measure.parse(measure.options(__doc__, repeat=3), argv)
    context, memory = multiprocessing.get_context("spawn"), {}
    for who in ("ours", "peer") if not args.quick else ():
        results = context.Queue()
        process = context.Process(target=peak, args=(who, args.shapes, args.device, args.dtype, results))
        process.start()
        memory[who] = results.get(timeout=600)
        process.join()
    pair, feeder = build_pair(shapes, args.device, args.dtype), Feeder(shapes, args.device, args.dtype)
    steps = steps_of(pair, feeder)
    apart = check(pair, steps)
    del steps["row by row"]
    times = measure.alternate(steps, args.repeat, args.device)
    middle = measure.medians(times)
    rows = feeder.rows(shapes.trained, label_tokens=shapes.label_tokens)
    tokens = sum(len(row.ids) for row in rows)
    speeds = {who: tokens / seconds for who, seconds in middle.items()}
    ratios = {"tokens per second": measure.ratio(times, "peer", "ours")}
    if memory:
        ratios["peak memory, ours of the peer's"] = memory["ours"] / memory["peer"]
    print(f"{[len(row.ids) for row in rows]} tokens in rows of {', '.join(MODALITIES)}")
    print(measure.table(("", "seconds", "tokens/s"), [(who, middle[who], speeds[who]) for who in middle]))
    print(measure.table(("peak over before", "MiB"), list(memory.items())))
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} x")
    parts, through = phases(pair, steps), tokens_of(rows)
    print(measure.table(("seconds of", *parts["ours"]), [(who, *each.values()) for who, each in parts.items()]))
    print(measure.table(("tokens", "forward", "backward"), [(who, *each.values()) for who, each in through.items()]))
    profiles = {who: measure.profile(steps[who], args.device) for who in ("ours", "peer")}
    result = {
        "profiles": profiles,
        "medians": middle,
        "tokens_per_second": speeds,
        "peak_mib": memory,
        "phases": parts,
        "through": through,
        "ratios": ratios,
        "differ": apart,
    }
    return measure.finish("training_step", args, result)


if __name__ == "__main__":
    main()
