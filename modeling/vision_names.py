"""What a picture shows, by name: one of a list that is given, for the decoder to say or to reason about."""

import math
from collections.abc import Sequence

import torch
from torch import nn

END = -1
"""Stands behind the ids of a name."""
LIKELY = 8
"""Names of a picture that may be said."""
SEEN = 0.5
"""Probability that a thing is at some place, from which it counts as seen."""
UNNAMED = 0
"""The class of pictures that have none of the names; those of the list follow."""


Named = list[tuple[tuple[int, ...], float]]
"""Names as ids, with log-probabilities, the likeliest first."""


class VisionNames(nn.Module):
    """Classifies a picture by the features of its tower, and gives the name as the decoder's own tokens.

    Tags beside a picture's tokens, as in Tag2Text (Huang et al., arXiv 2303.05657). A softmax over places tells where
    to look for the one thing that a picture shows; of several each is seen at its own place.

    Args:
        feature_size: of the vision tower.
        count, longest, hidden_size, dropout: see `config.vision_names`.
    """

    names: torch.Tensor

    def __init__(self, feature_size: int, *, count: int, longest: int, hidden_size: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.places = nn.Linear(feature_size, 1)
        self.down = nn.Linear(feature_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, 1 + count)
        self.register_buffer("names", torch.full((count, longest), END, dtype=torch.int32))

    @property
    def known(self) -> int:
        """How many names the list has."""
        return int((self.names[:, 0] != END).sum())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[pictures, places, feature_size]` -> logits `[pictures, 1 + known]` of none and all names."""
        features = self._normed(features)
        where = self.places(features).softmax(dim=1)
        return self._logits((where * features).sum(1))

    def at_places(self, features: torch.Tensor) -> torch.Tensor:
        """The same of what is at each place, `[pictures, places, 1 + known]`."""
        return self._logits(self._normed(features))

    def _normed(self, features: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(features.to(self.norm.weight.dtype))
        return normed

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        seen = nn.functional.gelu(self.down(features))
        logits: torch.Tensor = self.head(self.dropout(seen))[..., : 1 + self.known]
        return logits.float()

    @torch.no_grad()
    def learn_names(self, names: Sequence[Sequence[int]]) -> None:
        """Keeps a list of names, each the ids of its tokens.

        Raises:
            ValueError: more names, or longer ones, than `config.vision_names` has room for; or a name twice.
        """
        count, longest = self.names.shape
        if len(names) > count or any(not 0 < len(name) <= longest for name in names):
            raise ValueError(
                f"vision_names: {len(names)} names of up to {max(map(len, names), default=0)} tokens, there is room "
                f"for {count} of 1 to {longest}"
            )
        if len({tuple(name) for name in names}) < len(names):
            raise ValueError("vision_names: a name is given twice")
        self.names.fill_(END)
        for row, name in zip(self.names, names, strict=False):
            row[: len(name)] = torch.tensor(name, dtype=torch.int32)

    def classes_of(self, answers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The class of the ids of each answer `[tokens]`, `[answers]`."""
        listed = {tuple(token for token in row if token != END): i for i, row in enumerate(self.names.tolist(), 1)}
        listed.pop((), None)  # room for more names
        classes = [listed.get(tuple(answer.tolist()), UNNAMED) for answer in answers]
        return torch.tensor(classes, device=self.names.device)

    @torch.no_grad()
    def likely_names(self, features: torch.Tensor) -> list[Named]:
        """Ids of the likeliest names of each picture with their log-probabilities, the likeliest first; () of none."""
        return self._best(self(features).log_softmax(-1))

    @torch.no_grad()
    def seen_names(self, features: torch.Tensor) -> list[Named]:
        """The same of what is seen somewhere in each picture, of which there may be several, and none is ().

        What is at one place is taken to be independent of the others (noisy-or), as in learning; a name that is second
        where it is likeliest is another name of the same thing.
        """
        places = self.at_places(features).softmax(-1)
        places[..., UNNAMED] = 0
        nowhere = torch.log1p(-places.clamp(max=1 - 1e-6)).sum(1)
        somewhere = (-torch.expm1(nowhere)).log()  # [pictures, 1 + known]
        first = places.argmax(2).gather(1, places.argmax(1)) == torch.arange(places.shape[2], device=places.device)
        somewhere.masked_fill_(~first, -torch.inf)
        return [[each for each in names if each[1] > math.log(SEEN)] for names in self._best(somewhere)]

    def _best(self, chances: torch.Tensor) -> list[Named]:
        """Ids of the classes that have the highest of `chances` `[pictures, 1 + known]`."""
        best, classes = chances.cpu().topk(min(LIKELY, chances.shape[1]))
        ids = self.names.cpu()[classes - 1]  # [pictures, names, longest]; those of none are not looked at
        ids[classes == UNNAMED] = END
        return [
            [(tuple(token for token in name if token != END), chance) for name, chance in zip(*picture, strict=True)]
            for picture in zip(ids.tolist(), best.tolist(), strict=True)
        ]
