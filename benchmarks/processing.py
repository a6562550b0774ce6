"""Pictures and clips to tensors: our processors beside those of transformers' Phi4Multimodal.

python -m benchmarks.processing [--repeat 15] [--quick] [--json FILE]

Both must give the same values. What one gives is freed before the next begins.
"""

from typing import Any

from benchmarks import measure
from benchmarks.pair import Feeder


def check(feeder: Feeder, pictures: list[Any], clips: list[Any]) -> float:
    """The largest difference between both ways.

    Raises:
        RuntimeError: it is more than rounding.
    """
    ours, theirs = feeder.pictures(pictures), feeder.peer_pictures(pictures, return_tensors="pt")
    apart = (ours["pixel_values"] - theirs["image_pixel_values"].flatten(0, 1)).abs().max().item()
    if not (ours["image_attention_mask"] == theirs["image_attention_mask"].flatten(0, 1)).all():
        raise RuntimeError("the masks of the pictures differ")
    found, wanted = (
        feeder.clips(clips, sampling_rate=16000),
        feeder.peer_clips(clips, sampling_rate=16000, return_tensors="pt"),
    )
    heard = (found["input_features"] - wanted["audio_input_features"]).abs().max().item()
    if max(apart, heard) > 1e-3:
        raise RuntimeError(f"pictures differ by {apart:.3g}, clips by {heard:.3g}")
    return max(apart, heard)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints seconds and ratios."""
    args, shapes = measure.parse(measure.options(__doc__, repeat=15, shapes="full"), argv)
    feeder = Feeder(shapes)
    count, size, seconds = shapes.processed
    pictures = [feeder.picture(size, seed) for seed in range(count)]
    clips = [feeder.clip(seconds, seed) for seed in range(count)]
    apart = check(feeder, pictures[:3], clips[:3])
    ways = {
        "pictures, ours": lambda: feeder.pictures(pictures),
        "pictures, peer": lambda: feeder.peer_pictures(pictures, return_tensors="pt"),
        "clips, ours": lambda: feeder.clips(clips, sampling_rate=16000),
        "clips, peer": lambda: feeder.peer_clips(clips, sampling_rate=16000, return_tensors="pt"),
    }
    times = measure.alternate(ways, args.repeat)
    ratios = {kind: measure.ratio(times, f"{kind}, peer", f"{kind}, ours") for kind in ("pictures", "clips")}
    middle = measure.medians(times)
    print(f"{count} pictures of {size[1]} x {size[0]}, {count} clips of {seconds:g} s")
    print(measure.table(("", "seconds"), list(middle.items())))
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} x")
    profiles = {name: measure.functions(way) for name, way in ways.items()}
    result = {"profiles": profiles, "medians": middle, "ratios": ratios, "differ": apart}
    return measure.finish("processing", args, result)


if __name__ == "__main__":
    main()
