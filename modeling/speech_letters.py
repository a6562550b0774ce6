"""What a clip spells: CTC over letters, of which a few hours of speech hold many examples, and of each token few."""

import unicodedata
from functools import cached_property
from typing import Any

import torch
from torch import nn

BLANK = 0
"""Of the letters, the one that stands for nothing heard; the alphabet's follow."""


class SpeechLetters(nn.Module):
    """Reads letters off a clip's finest tokens, and knows how each token of the decoder is spelled.

    Args:
        width: of the tokens that the blocks of `config.speech_context` give.
        vocab_size: of the decoder.
        alphabet, longest: see `config.speech_letters`.
    """

    spelling: torch.Tensor

    def __init__(self, width: int, vocab_size: int, *, alphabet: str, longest: int):
        super().__init__()
        self.alphabet = alphabet
        self.head = nn.Linear(width, 1 + len(alphabet))
        self.register_buffer("spelling", torch.zeros(vocab_size, longest, dtype=torch.uint8))

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
        self.__dict__.pop("trie", None)
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
    def trie(self) -> "SpellingTrie":
        """All spellings; they do not change once they are read."""
        return SpellingTrie(self.spelling.cpu())


def folded(text: str, alphabet: str) -> str:
    """The letters of a token's text that an alphabet of small letters has; every white space counts as a space.

    Nobody hears a dash: where signs alone stand behind a space, the next word's own space is the one that is heard.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).replace("\u2019", "'")
    letters = "".join(letter for letter in (" " if each.isspace() else each for each in plain) if letter in alphabet)
    return "" if letters.isspace() and not text.isspace() else letters


class SpellingTrie:
    """Spellings by their common beginnings: of each depth, every different beginning of that many letters once.

    Args:
        spelling: `[tokens, longest]`, 0 behind a token's letters.

    Attributes:
        parents: of each depth, the place of each beginning's own beginning in the depth before.
        letters: of each depth, the last letter of each beginning.
        tokens: of each depth, which tokens end there, and at which beginning: `(tokens, places)`.
        silent: the tokens without a letter.
    """

    def __init__(self, spelling: torch.Tensor):
        lengths = (spelling != BLANK).sum(1)
        self.silent = (lengths == 0).nonzero().squeeze(1)
        self.parents: list[torch.Tensor] = []
        self.letters: list[torch.Tensor] = []
        self.tokens: list[tuple[torch.Tensor, torch.Tensor]] = []
        before = torch.zeros(len(spelling), dtype=torch.long)  # place of each token's beginning
        for depth in range(1, int(lengths.max()) + 1):
            rows = (lengths >= depth).nonzero().squeeze(1)
            beginnings, places = torch.unique(spelling[rows, :depth], dim=0, return_inverse=True)
            self.letters.append(beginnings[:, -1].long())
            self.parents.append(torch.zeros(len(beginnings), dtype=torch.long).index_copy(0, places, before[rows]))
            before = before.index_copy(0, rows, places)
            ending = lengths[rows] == depth
            self.tokens.append((rows[ending], places[ending]))
