"""Which adapter a row takes: a table from what the row contains to an adapter name."""

import torch

from .configuration_mixlora import MODALITIES, MixLoraConfig


class ModalityRouter:
    """Maps rows to adapters by the table `config.routing` (Phi-4-Multimodal's: image and speech together take vision).

    Stateless: it reads the config and the placeholders of a prompt, nothing else.
    """

    def __init__(self, config: MixLoraConfig):
        self.config = config

    @property
    def names(self) -> list[str]:
        """Adapter names in the order that `adapter_ids` counts: sorted, since a saved config keeps no other order."""
        return sorted(self.config.adapters)

    def modalities(self, input_ids: torch.Tensor) -> list[str]:
        """What each row of `input_ids` `[batch, length]` contains: text, vision, speech or vision_speech."""
        image = self.contains(input_ids, self.config.image_token_id)
        audio = self.contains(input_ids, self.config.audio_token_id)
        return [MODALITIES[int(i) + 2 * int(a)] for i, a in zip(image, audio, strict=True)]

    def adapter_names(self, modalities: list[str]) -> list[str | None]:
        """The adapter of each row, None for the base alone.

        Raises:
            ValueError: the table names an adapter that is not loaded, with the row and the modality; or another one is
                merged, so that this row would be answered with the wrong weights.
        """
        result = []
        for row, modality in enumerate(modalities):
            name = self.config.routing[modality]
            if self.config.merged_adapter is not None:
                self._check_merged(row, modality, name)
                name = None  # it acts in the decoder's weights
            if name is not None and name not in self.config.adapters:
                raise ValueError(
                    f"row {row} ({modality}) needs adapter {name!r}, which is not loaded; loaded: {self.names}. "
                    f"Load it, or set config.routing[{modality!r}] to None to use the base."
                )
            result.append(name)
        return result

    def _check_merged(self, row: int, modality: str, name: str | None) -> None:
        merged = self.config.merged_adapter
        if name != merged:
            takes = f"adapter {name!r}" if name else "the base alone"
            raise ValueError(
                f"row {row} ({modality}) takes {takes}, but adapter {merged!r} is merged into the decoder's weights. "
                "Load a checkpoint that is not merged, or pass adapter_ids of -1 to have the merged weights answer."
            )

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`adapter_ids` LongTensor `[batch]` for `input_ids` `[batch, length]`; -1 is the base alone."""
        names = self.adapter_names(self.modalities(input_ids))
        ids = [-1 if name is None else self.names.index(name) for name in names]
        return torch.tensor(ids, dtype=torch.long, device=input_ids.device)

    def continued(self, input_ids: torch.Tensor, seen: int) -> torch.Tensor:
        """The same for conversations of which the first `seen` tokens are in a cache.

        Raises:
            ValueError: what is new in a row changes its adapter, so the cache was computed with another one.
        """
        adapter_ids = self(input_ids)
        before = self(input_ids[:, :seen]) if seen else adapter_ids
        if changed := (adapter_ids != before).nonzero().flatten().tolist():
            row = changed[0]
            old, new = (["the base", *self.names][int(ids[row]) + 1] for ids in (before, adapter_ids))
            raise ValueError(
                f"row {row}: what is new in it needs {new}, but its cache was computed with {old}. Start from an "
                "empty cache with the whole conversation, or pass adapter_ids to keep the route"
            )
        return adapter_ids

    @staticmethod
    def contains(input_ids: torch.Tensor, token_id: int | None) -> list[bool]:
        """For each row of `input_ids` `[batch, length]`, whether `token_id` is in it."""
        if token_id is None:
            return [False] * input_ids.shape[0]
        return (input_ids == token_id).any(dim=1).tolist()
