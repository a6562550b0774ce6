"""What a clip spells: CTC over letters, of which a few hours of speech hold many examples, and of each token few."""

import zlib
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn

from .spelling import SpelledTokens
from .word_search import Words, likely_texts

TEXTS = 16
"""Texts of a clip that the decoder chooses from."""


class SpeechLetters(SpelledTokens):
    """Reads letters off a clip's finest tokens, and knows how each token of the decoder is spelled.

    Args:
        width: of the tokens that the blocks of `config.speech_context` give.
        vocab_size: of the decoder.
        alphabet, longest, words: see `config.speech_letters`.
    """

    words: torch.Tensor

    def __init__(self, width: int, vocab_size: int, *, alphabet: str, longest: int, words: int):
        super().__init__(vocab_size, alphabet, longest)
        self.head = nn.Linear(width, 1 + len(alphabet))
        self.register_buffer("words", torch.zeros(words, dtype=torch.uint8))

    def forward(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """`[tokens, width]` of each clip -> log-probabilities of nothing and of each letter, `[tokens, letters]`."""
        return [self.head(clip).float().log_softmax(-1) for clip in clips]

    @cached_property
    def _counted(self) -> list[list[str]]:
        """The words that [`learn_words`] was given, those of each power of two of their counts."""
        packed = bytes(self.words.tolist())
        groups = zlib.decompressobj().decompress(packed).decode().split("\n") if any(packed) else []
        return [group.split() for group in groups]

    @cached_property
    def known_words(self) -> Words:
        """All words, for what is read in pictures."""
        return self._words_from(0)

    @cached_property
    def said_words(self) -> Words:
        """Those that count more than once: the others stand in a dictionary alone, and hardly anybody says them."""
        return self._words_from(1)

    def _words_from(self, least: int) -> Words:
        return Words({word: 2**power for power, group in enumerate(self._counted) if power >= least for word in group})

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
        for name in ("_counted", "known_words", "said_words"):
            self.__dict__.pop(name, None)

    def likely_texts(self, heard: torch.Tensor) -> list[tuple[str, float]]:
        """The likeliest texts of a clip, whose letters have log-probabilities `heard` `[tokens, letters]`."""
        return likely_texts(heard, self.alphabet, self.said_words, TEXTS)
