"""Teach the part that reads pictures what letters look like, before CTC teaches it to read lines.

Run: python scripts/teach_letters.py CHECKPOINT OUTPUT [--steps N]     (after scripts/fetch.py)

From whole pictures CTC would have to find out what a letter is and where it stands at once, which takes millions of
them. Here strips of random letters are drawn, so that it is known what stands at each place: the faces are those that
`prepare_words.py` trains on, and no word is shown.
"""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path
from typing import TYPE_CHECKING

from common import SEED, run_main, say
from picture_files import STROKE_CONTRAST, brightness_apart, random_colour
from prepare_words import Face, balanced, family_split

if TYPE_CHECKING:
    import torch
    from PIL import ImageFont

    from mixlora.modeling.vision_letters import VisionLetters

STRIP = (64, 128)
"""Height and width of a strip, in pixels."""
HEIGHTS = (16, 44)
"""Sizes of a face in pixels."""
CORE = 0.5
"""Share of a letter's width and height, in its middle, that counts as the letter; around it nothing is asked."""
ASKED_NOWHERE = -100
BATCH, RATE, REPORT = 64, 2e-3, 100


def font_of(face: Face, size: int, fonts: dict[tuple[Path, int], ImageFont.FreeTypeFont]) -> ImageFont.FreeTypeFont:
    """A face in a size, read once."""
    from PIL import ImageFont

    if (face.path, size) not in fonts:
        fonts[face.path, size] = ImageFont.truetype(face.path, size)
    return fonts[face.path, size]


def mark_letter(labels: torch.Tensor, cell: tuple[int, int], box: tuple[float, ...], letter: int) -> None:
    """Notes a letter, in place, in the cells in the middle of its box; in those around it nothing is asked."""
    middle, half = (box[0] + box[2]) / 2, max(box[2] - box[0], 4) / 2
    centre, reach = (box[1] + box[3]) / 2, max(box[3] - box[1], 4) / 2
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            x, y = abs((column + 0.5) * cell[1] - middle), abs((row + 0.5) * cell[0] - centre)
            if x <= max(half * CORE, cell[1] / 2) and y <= max(reach * CORE, cell[0] / 2):
                labels[row, column] = letter
            elif x <= half and y <= reach + cell[0] / 2 and labels[row, column] == 0:
                labels[row, column] = ASKED_NOWHERE


def draw_strip(
    face: Face, font: ImageFont.FreeTypeFont, alphabet: str, cell: tuple[int, int], rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """A strip `[3, height, width]`, from 0 to 1, with letters in a row, and those of each cell, `[rows, columns]`."""
    import torch
    from PIL import Image, ImageDraw

    height, width = STRIP
    mask, labels = Image.new("L", (width, height)), torch.zeros(height // cell[0], width // cell[1], dtype=torch.long)
    pen = ImageDraw.Draw(mask)
    left, base = rng.uniform(-10, 40), rng.uniform(0.05, 0.75) * (height - font.size)
    case = str.upper if face.one_case else rng.choice((str.lower, str.lower, str.upper))
    while left < width:
        letter = rng.choice(string.ascii_lowercase + string.digits) if rng.random() > 0.08 else " "
        shown = case(letter)
        box = pen.textbbox((left, base), shown, font)
        pen.text((left, base), shown, 255, font)
        if letter != " " and box[2] > box[0]:
            mark_letter(labels, cell, box, 1 + alphabet.index(letter))
        left += font.getlength(shown) * rng.uniform(0.98, 1.1)
        if rng.random() < 0.04:
            break
    ink, paper = random_colour(rng), random_colour(rng)
    while brightness_apart(ink, paper) < STROKE_CONTRAST:
        ink, paper = random_colour(rng), random_colour(rng)
    alpha = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, height, width) / 255
    colours = [torch.tensor(colour)[:, None, None] / 255 for colour in (ink, paper)]
    noise = torch.randn(3, height, width) * rng.choice((0.0, 0.0, 0.03, 0.08))
    strip = alpha * colours[0] + (1 - alpha) * (colours[1] + noise)
    return strip.clamp(0, 1), labels


def teach(reader: VisionLetters, steps: int, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """Cross entropy of the letter at each place of drawn strips; `mean` and `spread` are the picture processor's."""
    import torch

    rng, fonts = random.Random(f"{SEED} strips"), {}
    torch.manual_seed(SEED)
    faces = balanced(family_split()["train"])
    patch = reader.stem.stride[0]
    cell = patch * 2 ** (len(reader.stages) - 1), patch
    optimizer = torch.optim.AdamW(reader.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    right = asked = 0
    for step in range(1, steps + 1):
        strips, labels = [], []
        for _ in range(BATCH):
            face = rng.choice(faces)
            font = font_of(face, 2 * rng.randint(HEIGHTS[0] // 2, HEIGHTS[1] // 2), fonts)
            strip, letters = draw_strip(face, font, reader.alphabet, cell, rng)
            strips.append(strip)
            labels.append(letters)
        wanted = torch.stack(labels)
        with torch.autocast("cpu", torch.bfloat16):
            scores = reader.at_each_place((torch.stack(strips) - mean) / spread)
        loss = torch.nn.functional.cross_entropy(
            scores.float().flatten(0, 2), wanted.flatten(), ignore_index=ASKED_NOWHERE
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        letters = wanted > 0
        right += int((scores.argmax(-1) == wanted)[letters].sum())
        asked += int(letters.sum())
        if step % REPORT == 0:
            say(
                f"step {step:,} of {steps:,}: loss {loss.item():.3f}, {100 * right / asked:.1f} % of the letters right"
            )
            right = asked = 0


def main() -> None:
    """Teaches the reader of a checkpoint, and writes it with its processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args()

    import torch

    from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor

    model = MixLoraForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32)
    processor = MixLoraProcessor.from_pretrained(args.checkpoint)
    mean, spread = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    teach(model.model.vision_letters, args.steps, mean, spread)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    run_main(main)
