"""What is written in a picture: CTC over letters along each of its lines, from the pixels."""

from functools import cached_property
from typing import Any

import torch
from torch import nn

from .spelling import SpelledTokens
from .word_search import Words, likely_texts

BEAMS = 8
"""Texts of a line, and of a picture, that are followed: what is written is less doubtful than what is said."""
ROWS = 7
"""Rows whose columns together tell which line runs in the middle one of them."""
BREAK = "\n"
"""The letter of the alphabet that parts lines."""


class TallBlock(nn.Module):
    """A residual convolution that sees `reach` rows up and down, so that a line knows of those above it."""

    def __init__(self, width: int, reach: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=(reach, 1), dilation=(reach, 1))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`[pictures, width, height, columns]`, of the same shape again."""
        return maps + nn.functional.relu(self.conv(self.norm(maps)))


class VisionLetters(SpelledTokens):
    """Reads lines of text, the topmost first, each as a row of columns that are as fine as a patch.

    The stages of a small convolutional network halve the height alone. For each line and column a softmax over the
    height then tells where the line runs, so that lines may lie aslant, and CTC reads what is gathered there (CRNN:
    Shi et al., arXiv 1507.05717, with attention in place of cropped lines). The softmax goes by what is near, and by
    what stands in all columns of the rows around: beside the end of a short line the letters of a longer one below
    look like a first line, but for that.

    Args:
        vocab_size: of the decoder.
        alphabet, longest, lines, tokens, widths, layers, patch_size: see `config.vision_letters`.
    """

    plain: torch.Tensor
    noted = ("spelling", "plain")

    def __init__(
        self,
        vocab_size: int,
        *,
        alphabet: str,
        longest: int,
        lines: int,
        tokens: int,
        widths: list[int],
        layers: list[int],
        patch_size: int,
    ):
        super().__init__(vocab_size, alphabet, longest)
        self.tokens = tokens
        self.register_buffer("plain", torch.zeros(vocab_size, dtype=torch.uint8))
        self.stem = nn.Conv2d(3, widths[0], 2 * patch_size, stride=patch_size, padding=patch_size // 2)
        self.stages = nn.ModuleList()
        for before, width, depth in zip([None, *widths], widths, layers, strict=False):
            halved: list[nn.Module] = [] if before is None else [nn.Conv2d(before, width, (2, 1), stride=(2, 1))]
            self.stages.append(nn.Sequential(*halved, *(TallBlock(width, 2**i) for i in range(depth))))
        self.norm = nn.GroupNorm(1, widths[-1])
        self.heights = nn.Conv2d(widths[-1], lines, 1)
        self.rows = nn.Conv1d(2 * widths[-1], lines, ROWS, padding=ROWS // 2)
        self.head = nn.Linear(widths[-1], 1 + len(alphabet))

    def blank(self) -> torch.Tensor:
        """`pixel_values` of one black picture."""
        side = self.stem.stride[0] * 2 ** (len(self.stages) - 1)
        return torch.zeros(1, 3, side, side)

    def maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[pictures, 3, height, width]` -> features `[pictures, width, rows, columns]`."""
        maps = self.stem(pixel_values.to(self.stem.weight.dtype, memory_format=torch.channels_last))
        for stage in self.stages:
            maps = stage(maps)
        normed: torch.Tensor = self.norm(maps)
        return normed

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[pictures, 3, height, width]` -> log-probabilities of nothing and of each letter,
        `[pictures, lines, columns, letters]`."""
        maps = self.maps(pixel_values)
        along = self.rows(torch.cat([maps.mean(3), maps.amax(3)], dim=1))  # [pictures, lines, rows]
        where = (self.heights(maps) + along[..., None]).softmax(dim=2)  # [pictures, lines, rows, columns]
        gathered = torch.einsum("plrc,pwrc->plcw", where, maps)
        letters: torch.Tensor = self.head(gathered).float().log_softmax(-1)
        return letters

    def at_each_place(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores of nothing and of each letter where it stands, `[pictures, rows, columns, letters]`."""
        scores: torch.Tensor = self.head(self.maps(pixel_values).permute(0, 2, 3, 1))
        return scores

    def lines_of(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Letters of each line of the text of `ids` `[tokens]`; lines beyond those that are read are left out."""
        letters, count = self.spell(ids), self.heights.out_channels
        ends = (letters == 1 + self.alphabet.index(BREAK)).nonzero().flatten().tolist()
        starts = [0, *(end + 1 for end in ends)]
        lines = [letters[start:end] for start, end in zip(starts, [*ends, len(letters)], strict=True)][:count]
        return lines + [letters[:0]] * (count - len(lines))

    @torch.no_grad()
    def likely_texts(self, pixel_values: torch.Tensor, words: Words) -> list[list[tuple[str, float]]]:
        """The likeliest texts of each picture with their log-probabilities among themselves, the likeliest first.

        Their lines are parted by breaks; a picture in which nothing is written says "".
        """
        if not self.known:
            return [[("", 0.0)]] * len(pixel_values)
        signs = self.alphabet.replace(BREAK, " ")  # no line is broken once more
        pictures = self(pixel_values).cpu()
        return [_joined([likely_texts(line, signs, words, BEAMS, BEAMS) for line in lines]) for lines in pictures]

    def read_spelling(self, tokenizer: Any) -> None:
        """As for clips; notes also which tokens are written just as they are spelled."""
        if self.known:
            return
        super().read_spelling(tokenizer)
        self.__dict__.pop("_merges", None)
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        for place, letters in enumerate(self.spellings.spelled):
            text = tokenizer.decode([*before, place], clean_up_tokenization_spaces=False)
            self.plain[place] = bool(letters) and text.endswith(letters) and len(text) == 1 + len(letters)

    @cached_property
    def _merges(self) -> dict[str, int]:
        """Ids of the tokens of plain letters."""
        spelled = self.spellings.spelled
        return {spelled[place]: place for place in self.plain.nonzero().flatten().tolist()}

    def tokens_of(self, text: str) -> list[int]:
        """Ids of a text of plain letters, cut as byte-pair encoding does (Sennrich et al., ACL 2016): of neighbours
        those are merged first whose token came first."""
        parts = [letter for letter in text if letter in self._merges]
        while True:
            pairs = [(self._merges.get(parts[i] + parts[i + 1]), i) for i in range(len(parts) - 1)]
            known = [(token, i) for token, i in pairs if token is not None]
            if not known:
                return [self._merges[part] for part in parts]
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _joined(lines: list[list[tuple[str, float]]]) -> list[tuple[str, float]]:
    """The likeliest `BEAMS` texts from those of each line."""
    texts = [("", 0.0)]
    for line in lines:
        both = [
            (BREAK.join(part for part in (text, more.strip()) if part), score + other)
            for text, score in texts
            for more, other in line
        ]
        texts = sorted(both, key=lambda each: each[1], reverse=True)[:BEAMS]
    total = torch.tensor([score for _, score in texts]).logsumexp(0).item()
    return [(text, score - total) for text, score in texts]
