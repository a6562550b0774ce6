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
    kinds: torch.Tensor

    def __init__(self, feature_size: int, *, count: int, longest: int, hidden_size: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.places = nn.Linear(feature_size, 1)
        self.down = nn.Linear(feature_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, 1 + count)
        self.register_buffer("names", torch.full((count, longest), END, dtype=torch.int32))
        self.register_buffer("kinds", torch.zeros(count, dtype=torch.bool))

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
    def learn_names(self, names: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]] = ()) -> None:
        """Keeps a list of names, each the ids of its tokens.

        Args:
            names: of things and of kinds of things.
            kinds: those of kinds, such as "an animal", which a picture is called only where a question offers them.

        Raises:
            ValueError: more names, or longer ones, than `config.vision_names` has room for; a name twice; or a kind
                that is not among the names.
        """
        count, longest = self.names.shape
        if len(names) > count or any(not 0 < len(name) <= longest for name in names):
            raise ValueError(
                f"vision_names: {len(names)} names of up to {max(map(len, names), default=0)} tokens, there is room "
                f"for {count} of 1 to {longest}"
            )
        listed = {tuple(name): place for place, name in enumerate(names)}
        if len(listed) < len(names):
            raise ValueError("vision_names: a name is given twice")
        if strange := [list(kind) for kind in kinds if tuple(kind) not in listed]:
            raise ValueError(f"vision_names: kinds {strange} are not among the names")
        self.names.fill_(END)
        for row, name in zip(self.names, names, strict=False):
            row[: len(name)] = torch.tensor(name, dtype=torch.int32)
        self.kinds.zero_()[[listed[tuple(kind)] for kind in kinds]] = True

    def classes_of(self, answers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The class of the ids of each answer `[tokens]`, `[answers]`."""
        listed = self.listed()
        classes = [listed.get(tuple(answer.tolist()), UNNAMED) for answer in answers]
        return torch.tensor(classes, device=self.names.device)

    def listed(self) -> dict[tuple[int, ...], int]:
        """The class of each name, by its ids."""
        rows = self.names[: self.known].tolist()
        return {tuple(token for token in row if token != END): number for number, row in enumerate(rows, 1)}

    def likely_names(self, logits: torch.Tensor) -> list[Named]:
        """Ids of the likeliest things of each picture with their log-probabilities, the likeliest first; () of
        none. It takes what `forward` gives."""
        return self._best(self._of_things(logits).log_softmax(-1))

    def _of_things(self, logits: torch.Tensor) -> torch.Tensor:
        """Without kinds."""
        return torch.cat(
            [logits[..., :1], logits[..., 1:].masked_fill(self.kinds[: self.known].to(logits.device), -torch.inf)],
            dim=-1,
        )

    @torch.no_grad()
    def things_at(self, features: torch.Tensor) -> torch.Tensor:
        """Probabilities of things at each place, `[pictures, places, 1 + known]`; kinds and none have 0."""
        things = self._of_things(self.at_places(features)).softmax(-1)
        things[..., UNNAMED] = 0
        return things

    @staticmethod
    def somewhere(things: torch.Tensor) -> torch.Tensor:
        """Probability that each is at some place, `[pictures, 1 + known]`, of those that [`things_at`] gives.

        What is at one place is taken to be independent of the others (noisy-or), as in learning.
        """
        nowhere = torch.log1p(-things.clamp(max=1 - 1e-6)).sum(1)
        return -torch.expm1(nowhere)

    def seen_names(self, things: torch.Tensor) -> list[Named]:
        """Names of what is seen somewhere in each picture, in the order of places from the upper left to the lower
        right, with log-probabilities; none is (). It takes what [`things_at`] gives.

        A name that is second where it is likeliest is another name of the same thing.
        """
        somewhere, at = self.somewhere(things).log(), things.argmax(1)
        numbers = torch.arange(things.shape[2], device=things.device)
        somewhere.masked_fill_(things.argmax(2).gather(1, at) != numbers, -torch.inf)
        side = math.isqrt(things.shape[1])
        corner = at // side + at % side  # rows and columns from the upper left
        return [self._in_order(*picture) for picture in zip(somewhere, corner, strict=True)]

    def _in_order(self, chances: torch.Tensor, order: torch.Tensor) -> Named:
        """Those of one picture's names that are likelier than SEEN, by `order`, both `[1 + known]`."""
        best, classes = chances.topk(min(LIKELY, len(chances)))
        classes = classes[best > math.log(SEEN)]
        return self._named(chances, classes[order[classes].argsort(stable=True)])

    def _best(self, chances: torch.Tensor) -> list[Named]:
        """Names of the classes that have the highest of `chances` `[pictures, 1 + known]`."""
        best = chances.topk(min(LIKELY, chances.shape[1])).indices
        return [self._named(*picture) for picture in zip(chances, best, strict=True)]

    def _named(self, chances: torch.Tensor, classes: torch.Tensor) -> Named:
        """Ids of the names of `classes` `[names]`, () of none, each with its of `chances` `[1 + known]`."""
        ids = self.names.to(classes.device)[classes - 1]
        ids[classes == UNNAMED] = END
        names = [tuple(token for token in name if token != END) for name in ids.tolist()]
        named = zip(names, chances[classes].tolist(), strict=True)
        return [(name, chance) for name, chance in named if chance > -math.inf]
