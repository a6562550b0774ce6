"""Encoding pictures of different sizes in one batch: our vision tower and projector beside transformers'.

python -m benchmarks.towers [--repeat 2] [--shapes full] [--quick] [--device cuda --dtype bfloat16] [--json FILE]

One picture of 2688 x 2688 and seven of 448 x 448. transformers pads all to the crops of the largest, and runs every
layer. Where no patch is masked its attention looks one way only; it is timed as it is, and checked with that mended.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

from benchmarks import measure
from benchmarks.pair import Feeder, Pair, build_pair


def ways_of(pair: Pair, feeder: Feeder) -> dict[str, Callable[[], Any]]:
    """Both ways, as calls that give all tokens of all pictures `[tokens, width]`."""
    import torch

    sizes = [(height, width) for height, width, count in pair.shapes.collection for _ in range(count)]
    pictures = [feeder.picture(size, seed) for seed, size in enumerate(sizes)]
    ours = feeder.pictures(pictures)
    theirs = feeder.peer_pictures(pictures, return_tensors="pt")
    counts = ours.pop("num_img_tokens").tolist()
    ids = torch.full((1, sum(counts)), pair.shapes.image_id, device=pair.device)
    embeds = torch.zeros(1, sum(counts), pair.shapes.width, device=pair.device, dtype=feeder.dtype)
    placed = {name: value.to(pair.device) for name, value in ours.items()}
    placed["pixel_values"] = placed["pixel_values"].to(feeder.dtype)
    peer_pixels = theirs["image_pixel_values"].to(pair.device, feeder.dtype)
    peer_sizes, peer_masks = theirs["image_sizes"].to(pair.device), theirs["image_attention_mask"].to(pair.device)
    embedding = pair.peer.base_model.model.model.embed_tokens_extend.image_embed

    @torch.no_grad()
    def encode() -> Any:
        return torch.cat(pair.ours.get_image_features(**placed).pooler_output)

    @torch.no_grad()
    def peer() -> Any:
        return embedding(ids, embeds, peer_pixels, image_attention_mask=peer_masks, image_sizes=peer_sizes)[0]

    return {"ours": encode, "peer": peer}


def check(pair: Pair, ways: dict[str, Callable[[], Any]]) -> float:
    """How far nine tenths of the tokens are apart at most where the peer looks both ways, in standard deviations.

    A batch of another size rounds another crop otherwise, and at these loud weights each layer makes a rounding twenty
    times as large, so that the worst token tells nothing.

    Raises:
        RuntimeError: they differ.
    """
    attentions = [module for module in pair.peer.modules() if type(module).__name__ == "Phi4MultimodalVisionAttention"]
    with ExitStack() as mended:
        for module in attentions:
            mended.enter_context(mock.patch.object(module, "is_causal", False))
        wanted = ways["peer"]().float()
    apart = ((ways["ours"]().float() - wanted).abs().amax(-1).quantile(0.9) / wanted.std()).item()
    if apart > (5e-3 if next(pair.ours.parameters()).element_size() == 4 else 0.5):
        raise RuntimeError(f"the pictures differ by {apart:.3g} standard deviations")
    return apart


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints seconds and the ratio."""
    args, shapes = measure.parse(measure.options(__doc__, repeat=2), argv)
    pair, feeder = build_pair(shapes, args.device, args.dtype), Feeder(shapes, args.device, args.dtype)
    ways = ways_of(pair, feeder)
    apart = check(pair, ways)  # also warms up
    rounds = [{name: measure.timed(way, args.device) for name, way in ways.items()} for _ in range(args.repeat)]
    times = {name: [each[name] for each in rounds] for name in ways}
    middle, ratios = measure.medians(times), {"pictures": measure.ratio(times, "peer", "ours")}
    pictures = ", ".join(f"{count} of {height} x {width}" for height, width, count in shapes.collection)
    print(f"pictures: {pictures}")
    print(measure.table(("", "seconds"), list(middle.items())))
    print(f"pictures: {ratios['pictures']:.2f} x")
    profiles = {name: measure.profile(way, args.device) for name, way in ways.items()}
    result = {"profiles": profiles, "medians": middle, "ratios": ratios, "differ": apart}
    return measure.finish("towers", args, result)


if __name__ == "__main__":
    main()
