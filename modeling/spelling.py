"""How the tokens of a decoder are spelled, for CTC over letters in what is heard and what is read."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

BLANK = 0
"""Of the letters, the one that stands for nothing; the alphabet's follow."""


class SpelledTokens(nn.Module):
    """Knows how each token of the decoder is spelled.

    Args:
        vocab_size: of the decoder.
        alphabet: letters, of which CTC knows no others.
        longest: letters of a token at most.
    """

    spelling: torch.Tensor
    noted: tuple[str, ...] = ("spelling",)
    """Names of the buffers that [`read_spelling`] fills."""

    def __init__(self, vocab_size: int, alphabet: str, longest: int):
        super().__init__()
        self.alphabet = alphabet
        self.register_buffer("spelling", torch.zeros(vocab_size, longest, dtype=torch.uint8))

    @property
    def known(self) -> bool:
        """Whether tokens have spellings: not before a stage has trained the head, which says nothing until then."""
        return bool(self.spelling.any())

    def spell(self, ids: torch.Tensor) -> torch.Tensor:
        """Letters `[letters]`, from 1 on, of the text of `ids` `[tokens]`."""
        letters = self.spelling[ids]
        return letters[letters != BLANK].long()

    def letters_of(self, text: str) -> list[int]:
        """Letters, from 1 on, of a text; case, accents and other signs are passed over."""
        return [1 + self.alphabet.index(letter) for letter in folded(text, self.alphabet)]

    @torch.no_grad()
    def read_spelling(self, tokenizer: Any) -> None:
        """Notes how each token is spelled, unless that is known; case, accents and other signs are passed over.

        Raises:
            ValueError: a token of more letters than there is room for, or of more tokens than the decoder has.
        """
        if self.known:
            return
        self.__dict__.pop("spellings", None)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        before = tokenizer("a", add_special_tokens=False)["input_ids"]  # a first token may lose its space
        start = len(tokenizer.decode(before))
        for token, place in tokenizer.get_vocab().items():
            if place in special:
                continue
            text = tokenizer.decode([*before, place], clean_up_tokenization_spaces=False)[start:]
            letters = self.letters_of(text)
            rows, longest = self.spelling.shape
            if place >= rows or len(letters) > longest:
                raise ValueError(
                    f"letters: there is room for {rows} tokens of {longest} letters, and the tokenizer's "
                    f"{token!r} is token {place} of {len(letters)} letters"
                )
            self.spelling[place, : len(letters)] = torch.tensor(letters, dtype=torch.uint8)

    @cached_property
    def spellings(self) -> "Spellings":
        """All spellings; they do not change once they are read."""
        return Spellings(["".join(self.alphabet[i - 1] for i in row if i != BLANK) for row in self.spelling.tolist()])


def folded(text: str, alphabet: str) -> str:
    """The letters of a token's text that an alphabet of small letters has; every white space counts as a space.

    Nobody hears a dash: where signs alone stand behind a space, the next word's own space is the one that is heard.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).replace("\u2019", "'")
    letters = "".join(
        letter
        for letter in (" " if each.isspace() and each not in alphabet else each for each in plain)
        if letter in alphabet
    )
    return "" if letters.isspace() and not text.isspace() else letters


class Spellings:
    """How each token of a decoder is spelled.

    Args:
        spelled: the letters of each token, "" of one that nobody hears.

    Attributes:
        spelled: as given.
        silent: ids of those that nobody hears.
    """

    def __init__(self, spelled: list[str]):
        self.spelled = spelled
        self._tokens: dict[str, list[int]] = {}
        for token, letters in enumerate(spelled):
            self._tokens.setdefault(letters, []).append(token)
        self.silent = torch.tensor(self._tokens.pop("", []), dtype=torch.long)
        self._longest = max(map(len, self._tokens), default=0)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens spell together."""
        return "".join(self.spelled[token] for token in tokens if token < len(self.spelled))

    def starting(self, text: str, first: bool) -> Iterator[int]:
        """Tokens that `text` begins with; the `first` one of all may have a space in front or none."""
        for beginning in (text, f" {text}") if first else (text,):
            for size in range(1, min(len(beginning), self._longest) + 1):
                yield from self._tokens.get(beginning[:size], ())
