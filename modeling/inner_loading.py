"""Loading the model without its head from checkpoints that are not stored as ours."""

from pathlib import Path
from typing import Any

from .configuration_mixlora import MixLoraConfig
from .phi4_checkpoint import HUB_OPTIONS, phi4_layout


class InnerLoading:
    """`from_pretrained` of [`MixLoraModel`]: transformers' own would draw weights that lie under other names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Phi-4's layouts, and a decoder that is named by reference, are read by the whole model.

        Args and errors are those of [`MixLoraForConditionalGeneration.from_pretrained`].
        """
        name = pretrained_model_name_or_path
        parent: Any = super()
        if name is None or _is_stored_as_ours(name, kwargs):
            return parent.from_pretrained(name, *args, **kwargs)
        from .modeling_mixlora import MixLoraForConditionalGeneration  # it builds upon the model here

        whole = MixLoraForConditionalGeneration.from_pretrained(name, *args, **kwargs)
        return (whole[0].model, whole[1]) if isinstance(whole, tuple) else whole.model


def _is_stored_as_ours(name: str | Path, options: dict[str, Any]) -> bool:
    hub = {option: options[option] for option in HUB_OPTIONS if option in options}
    if phi4_layout(name, hub) is not None:
        return False
    config = options.get("config")
    if not isinstance(config, MixLoraConfig):
        config = MixLoraConfig.from_pretrained(config or name, **hub)
    return not config.base_model
