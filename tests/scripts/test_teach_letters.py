"""Strips of letters from which a reader learns what stands where."""

import random
from pathlib import Path

import matplotlib
import pytest
import teach_letters
import torch
from prepare_words import Face
from teach_letters import ASKED_NOWHERE, STRIP, draw_strip, font_of, teach

from mixlora.modeling.configuration_mixlora import VISION_LETTERS
from mixlora.modeling.vision_letters import VisionLetters

CELL = (16, 4)


@pytest.fixture
def face() -> Face:
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return Face("DejaVu Sans", path, one_case=False)


def test_letters_are_asked_where_ink_is(face: Face) -> None:
    alphabet = VISION_LETTERS["alphabet"]
    for seed in range(8):
        strip, labels = draw_strip(face, font_of(face, 36, {}), alphabet, CELL, random.Random(seed))
        assert strip.shape == (3, *STRIP) and labels.shape == (STRIP[0] // CELL[0], STRIP[1] // CELL[1])
        asked = labels > 0
        assert asked.any() and (labels == 0).any() and (labels == ASKED_NOWHERE).any()
        assert {alphabet[letter - 1] for letter in labels[asked].tolist()} <= set(alphabet) - set(" '\n")
        cells = strip.unfold(1, CELL[0], CELL[0]).unfold(2, CELL[1], CELL[1])  # [3, rows, columns, 16, 4]
        varies = cells.flatten(3).std(-1).amax(0)
        assert varies[asked].mean() > 2 * varies[labels == 0].mean()


def test_a_reader_learns_letters_from_strips(face: Face, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(teach_letters, "family_split", lambda: {"train": [face]})
    monkeypatch.setattr(teach_letters, "BATCH", 4)
    monkeypatch.setattr(teach_letters, "REPORT", 15)
    torch.manual_seed(0)
    small = {"widths": [8, 8, 16], "layers": [1, 1, 1]}
    teach(VisionLetters(9, **VISION_LETTERS | small), 30, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines())
    assert last < first
