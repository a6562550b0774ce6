"""Parts of the model that no row of this process needs, when it trains beside others.

Data-parallel training (DDP, FSDP, ZeRO) exchanges gradients, and gathers what is sharded, part by part: every rank
has to run the same parts. Where a rank's rows hold no picture, say, the vision projector runs on no tokens at all
there. Its gradients are then zeros, and its collectives the same as on the ranks that have pictures. Outside of a
process group nothing is added.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .ranks import in_process_group
from .routed_lora import RoutedLinear


def _trains(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether gradients reach any of them; DeepSpeed's ZeRO-3 gathers frozen ones as well, module by module."""
    enabled = torch.is_grad_enabled()
    return any((enabled and parameter.requires_grad) or hasattr(parameter, "ds_id") for parameter in parameters)


def runs_everywhere(module: nn.Module) -> bool:
    """Whether all ranks must run `module`: it trains, or it is sharded on its own, so that its layers are gathered.

    What FSDP shards together with the whole model is gathered before the forward, and is seen here as plain tensors.
    """
    if not in_process_group():
        return False
    from torch.distributed.tensor import DTensor

    parameters = list(module.parameters())
    return _trains(parameters) or any(isinstance(parameter, DTensor) for parameter in parameters)


def trained_adapters(decoder: nn.Module) -> set[str]:
    """Names of a decoder's adapters that must act on all ranks; none outside of a process group.

    Those of experts are among them, trained or not: ranks count together how evenly experts are used.
    """
    if not in_process_group():
        return set()
    return {
        name
        for projection in decoder.modules()
        if isinstance(projection, RoutedLinear)
        for name in projection.scaling
        if name in projection.lora_experts or _trains(part.weight for part in projection.pair(name))
    }


def whole_table(embedding: nn.Embedding) -> torch.Tensor:
    """The weights `[vocabulary, width]`; where they are sharded, as the embedding's own forward gathers them."""
    if not in_process_group():
        return embedding.weight
    from torch.distributed.tensor import DTensor

    if not isinstance(embedding.weight, DTensor):
        return embedding.weight
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


class Idle:
    """Runs, in the order of a forward, the towers and projectors that all ranks must run and this one has no use for.

    Each is to be asked for where it would act, since ranks must meet in the same order.

    Args:
        model: a `MixLoraModel`.
        device: of the inputs.

    Attributes:
        zeros: a zero for each part that was run, which depends on its parameters.
    """

    def __init__(self, model: Any, device: torch.device):
        self.model, self.device = model, device
        self.zeros: list[torch.Tensor] = []

    def tower(self, kind: str) -> torch.Tensor | None:
        """Features `[0, size]` of the tower of `kind` (vision, speech), run on its blank; None if it need not run."""
        tower = getattr(self.model, f"{kind}_tower", None)
        if tower is None or not runs_everywhere(tower):
            return None
        features = next(iter(tower(*(tensor.to(self.device) for tensor in tower.blank()))))[:0]
        self.zeros.append(features.sum())
        return features

    def layers_behind(self) -> None:
        """Layers behind a tower's feature layer, which act on no rank, if they are let train: DDP waits for them.

        What FSDP shards may be without gradients where all ranks agree.
        """
        if not in_process_group() or not torch.is_grad_enabled():
            return
        from torch.distributed.tensor import DTensor

        for tower in (getattr(self.model, f"{kind}_tower", None) for kind in ("vision", "speech")):
            behind: tuple[str, ...] = getattr(tower, "unused", tuple)()
            for name, parameter in tower.named_parameters() if behind else ():
                if name.startswith(behind) and parameter.requires_grad and not isinstance(parameter, DTensor):
                    self.zeros.append(parameter.flatten()[:0].sum())

    def context(self, context: Any, features: torch.Tensor | None) -> torch.Tensor | None:
        """Runs a `SpeechContext` on one token of zeros, and gives none of it, as its projectors take it; else
        `features`."""
        if context is None or not runs_everywhere(context):
            return features
        weight = context.reduce.weight
        token = torch.zeros(1, weight.shape[1], device=self.device, dtype=weight.dtype)
        nothing = context.joined(context([token]))[0][:0]
        self.zeros.append(nothing.sum())
        return nothing

    def pixels(self, part: Any) -> None:
        """Runs a part that reads pixels on its black picture, of which nothing counts."""
        if part is None or not runs_everywhere(part):
            return
        self.zeros.append(part(part.blank().to(self.device))[:0].sum())

    def projector(self, projector: nn.Module | None, features: torch.Tensor | None = None) -> None:
        """Runs a projector on `features` `[0, size]`, by default on none at all."""
        if projector is None or not runs_everywhere(projector):
            return
        if features is None:
            dtype = next(projector.parameters()).dtype
            size: Any = projector.input_size
            features = torch.zeros(0, size, device=self.device, dtype=dtype)
        self.zeros.append(projector(features).sum())

    def added_to(self, embeddings: torch.Tensor) -> torch.Tensor:
        """`embeddings`, which then depend on all that was run."""
        for zero in self.zeros:
            embeddings = embeddings + zero.to(embeddings.dtype)
        return embeddings
