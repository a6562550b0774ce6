"""What transformers' models inherit for adapters, acting on ours, or raising and saying what to do."""

from pathlib import Path
from typing import Any

import torch

from .adapter_folders import (
    adapter_tensors,
    by_pattern,
    check_config,
    check_dense,
    check_new,
    check_there,
    load_adapter,
    save_adapter,
    spec_of,
)
from .configuration_mixlora import check_adapter, check_experts, full_adapter
from .routed_lora import RoutedLinear


class AdapterMethods:
    """Adapters added, read, written, removed and merged by name. No method switches one on for all rows."""

    config: Any
    model: Any
    train: Any
    training: bool

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Adds a fresh adapter, which changes nothing until it is trained.

        Args:
            adapter_config: PEFT's `LoraConfig` that names its `target_modules`, or an entry of `config.adapters`.
            adapter_name: which rows take it is said by `config.routing`, or by `adapter_ids`.

        Raises:
            ValueError: the name is taken or wrong, the config is not supported, or it names no projection.
        """
        check_new(self, adapter_name)
        is_entry = isinstance(adapter_config, dict)
        spec = full_adapter(adapter_config) if is_entry else self._spec_of_lora(adapter_config, adapter_name)
        check_adapter(adapter_name, spec)
        self.model.add_pairs(adapter_name, spec)
        self.config.adapters[adapter_name] = spec
        self.train(self.training)  # new dropouts come in training mode

    def _spec_of_lora(self, config: Any, adapter: str) -> dict[str, Any]:
        from peft.tuners.tuners_utils import check_target_module_exists

        where = f"adapter {adapter!r}"
        check_config(config, where)
        projections = list(self.model.language_model.projections())
        if not config.target_modules:
            raise ValueError(f"{where}: target_modules is needed, a list of names or 'all-linear'")
        everywhere = config.target_modules == "all-linear"
        targeted = [p for p in projections if everywhere or check_target_module_exists(config, f"model.{p}")]
        outside = [n for n in ("lm_head", "model.embed_tokens") if check_target_module_exists(config, n)]
        if outside or not targeted:
            named = outside or config.target_modules
            raise ValueError(f"{where}: {named} are not projections of this decoder, such as {projections[0]}")
        ranks = {path: by_pattern(config.rank_pattern, path, config.r) for path in targeted}
        return spec_of(config, ranks, projections)

    def load_adapter(
        self,
        peft_model_id: str | Path,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        """Adds an adapter from a PEFT folder. Which rows take it is said by `config.routing`, or by `adapter_ids`."""
        if kwargs:
            raise ValueError(f"load_adapter takes a folder and adapter_name, not {sorted(kwargs)}")
        load_adapter(self, peft_model_id, adapter_name)
        self.train(self.training)  # new dropouts come in training mode

    def save_adapter(self, folder: str | Path, adapter_name: str) -> None:
        """Writes an adapter as a PEFT folder, which `PeftModel.from_pretrained` loads on the plain decoder."""
        save_adapter(self, folder, adapter_name)

    def get_adapter_state_dict(self, adapter_name: str, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """The tensors of an adapter under PEFT's names."""
        if state_dict is not None:
            raise ValueError("get_adapter_state_dict reads the model's own tensors; a state_dict is not taken")
        return {name: tensor.detach() for name, tensor in adapter_tensors(self, adapter_name).items()}

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Takes adapters out of every projection and of the config; modalities routed to them then raise.

        Raises:
            ValueError: no adapter of that name; nothing is taken out then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            check_there(self.config, name)
        for name in names:
            for module in self._holders(name):
                module.remove_adapter(name)
            del self.config.adapters[name]

    def split_adapter(self, adapter_name: str, experts: int = 4, top_k: int = 2, seed: int = 0) -> None:
        """Turns an adapter into experts: copies of its pairs, with a fresh router at each projection.

        What the model computes stays the same until it is trained: whichever copies a token takes, they are equal and
        their weights sum to 1 (LLaVA-MoD, arXiv 2408.15881, section 3.1).

        Args:
            experts: copies of each pair; top_k: how many of them a token takes.
            seed: of the routers.

        Raises:
            ValueError: no adapter of that name, it has experts already, or numbers out of range.
        """
        spec = check_there(self.config, adapter_name)
        check_experts(experts, top_k, f"adapter {adapter_name!r}")
        if spec.get("experts"):
            raise ValueError(f"adapter {adapter_name!r} has {spec['experts']} experts already")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self._holders(adapter_name):
                module.split_adapter(adapter_name, experts, top_k)
        self.config.adapters[adapter_name] = {**spec, "experts": experts, "top_k": top_k}

    def merge_adapter(self, adapter_name: str) -> None:
        """Folds an adapter into the decoder's weights, for serving one modality without the cost of its pairs.

        There is no way back, and no base any more: the other adapters are taken out, rows that the table does not
        route to this one raise, and `save_pretrained` writes the merged decoder, with `config.merged_adapter`.

        Raises:
            ValueError: no adapter of that name, it has experts, or the decoder is quantized.
        """
        check_dense(self.config, adapter_name, "the decoder")
        modules = self._holders(adapter_name)
        if any(not module.base_layer.weight.is_floating_point() for module in modules):
            raise ValueError(f"adapter {adapter_name!r} can't be merged: the decoder's weights are quantized")
        self.delete_adapter([name for name in self.config.adapters if name != adapter_name])
        for module in modules:
            module.merge_adapter(adapter_name)
        del self.config.adapters[adapter_name]
        self.config.merged_adapter, self.config.base_model = adapter_name, None

    def _holders(self, adapter: str) -> list[RoutedLinear]:
        return [m for m in self.model.language_model.projections().values() if m.holds(adapter)]
