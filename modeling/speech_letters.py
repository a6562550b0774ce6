"""What a clip spells: CTC over letters, of which a few hours of speech hold many examples, and of each token few."""

import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .word_search import Words, likely_texts

BLANK = 0
"""Of the letters, the one that stands for nothing heard; the alphabet's follow."""
TEXTS = 16
"""Texts of a clip that the decoder chooses from."""


class SpeechLetters(nn.Module):
    """Reads letters off a clip's finest tokens, and knows how each token of the decoder is spelled.

    Args:
        width: of the tokens that the blocks of `config.speech_context` give.
        vocab_size: of the decoder.
        alphabet, longest, words: see `config.speech_letters`.
    """

    spelling: torch.Tensor
    words: torch.Tensor

    def __init__(self, width: int, vocab_size: int, *, alphabet: str, longest: int, words: int):
        super().__init__()
        self.alphabet = alphabet
        self.head = nn.Linear(width, 1 + len(alphabet))
        self.register_buffer("spelling", torch.zeros(vocab_size, longest, dtype=torch.uint8))
        self.register_buffer("words", torch.zeros(words, dtype=torch.uint8))

    def forward(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """`[tokens, width]` of each clip -> log-probabilities of nothing and of each letter, `[tokens, letters]`."""
        return [self.head(clip).float().log_softmax(-1) for clip in clips]

    @property
    def known(self) -> bool:
        """Whether tokens have spellings: not before a stage has trained the head, which says nothing until then."""
        return bool(self.spelling.any())

    def spell(self, ids: torch.Tensor) -> torch.Tensor:
        """Letters `[letters]`, from 1 on, of the text of `ids` `[tokens]`."""
        letters = self.spelling[ids]
        return letters[letters != BLANK].long()

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
            letters = [1 + self.alphabet.index(letter) for letter in folded(text, self.alphabet)]
            rows, longest = self.spelling.shape
            if place >= rows or len(letters) > longest:
                raise ValueError(
                    f"speech_letters: there is room for {rows} tokens of {longest} letters, and the tokenizer's "
                    f"{token!r} is token {place} of {len(letters)} letters"
                )
            self.spelling[place, : len(letters)] = torch.tensor(letters, dtype=torch.uint8)

    @cached_property
    def spellings(self) -> "Spellings":
        """All spellings; they do not change once they are read."""
        return Spellings(["".join(self.alphabet[i - 1] for i in row if i != BLANK) for row in self.spelling.tolist()])

    @cached_property
    def known_words(self) -> Words:
        """The words that [`learn_words`] was given."""
        packed = bytes(self.words.tolist())
        groups = zlib.decompressobj().decompress(packed).decode().split("\n") if any(packed) else []
        return Words({word: 2**power for power, group in enumerate(groups) for word in group.split()})

    @torch.no_grad()
    def learn_words(self, counts: Mapping[str, int]) -> None:
        """Keeps words and how often each is said, to the next lower power of two.

        Raises:
            ValueError: a word that the alphabet does not spell, a count below 1, or more words than
                `config.speech_letters` has room for, in bytes.
        """
        for word, count in counts.items():
            if not word or " " in word or not set(word) <= set(self.alphabet) or count < 1:
                raise ValueError(
                    f"speech_letters: word {word!r} said {count} times: expected letters of {self.alphabet!r} without "
                    "a space, said once or more"
                )
        groups: list[list[str]] = [[] for _ in range(max(counts.values(), default=0).bit_length())]
        for word in sorted(counts):
            groups[counts[word].bit_length() - 1].append(word)
        packed = zlib.compress("\n".join(" ".join(group) for group in groups).encode(), level=9)
        if len(packed) > len(self.words):
            raise ValueError(
                f"speech_letters: {len(counts)} words take {len(packed)} bytes, there is room for {len(self.words)}"
            )
        self.words.zero_()[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self.__dict__.pop("known_words", None)

    def likely_texts(self, heard: torch.Tensor) -> list[tuple[str, float]]:
        """The likeliest texts of a clip, whose letters have log-probabilities `heard` `[tokens, letters]`."""
        return likely_texts(heard, self.alphabet, self.known_words, TEXTS)


def folded(text: str, alphabet: str) -> str:
    """The letters of a token's text that an alphabet of small letters has; every white space counts as a space.

    Nobody hears a dash: where signs alone stand behind a space, the next word's own space is the one that is heard.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).replace("\u2019", "'")
    letters = "".join(letter for letter in (" " if each.isspace() else each for each in plain) if letter in alphabet)
    return "" if letters.isspace() and not text.isspace() else letters


class Spellings:
    """How each token of a decoder is spelled.

    Args:
        spelled: the letters of each token, "" of one that nobody hears.

    Attributes:
        silent: ids of those that nobody hears.
    """

    def __init__(self, spelled: list[str]):
        self._spelled = spelled
        self._tokens: dict[str, list[int]] = {}
        for token, letters in enumerate(spelled):
            self._tokens.setdefault(letters, []).append(token)
        self.silent = torch.tensor(self._tokens.pop("", []), dtype=torch.long)
        self._longest = max(map(len, self._tokens), default=0)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens spell together."""
        return "".join(self._spelled[token] for token in tokens if token < len(self._spelled))

    def starting(self, text: str, first: bool) -> Iterator[int]:
        """Tokens that `text` begins with; the `first` one of all may have a space in front or none."""
        for beginning in (text, f" {text}") if first else (text,):
            for size in range(1, min(len(beginning), self._longest) + 1):
                yield from self._tokens.get(beginning[:size], ())
