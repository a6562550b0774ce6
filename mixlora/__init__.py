"""mixlora: a frozen text decoder with eyes and ears, by LoRA adapters that are routed row by row.

Importing this package is light: it loads neither torch nor transformers. The public names load on first use, and
transformers' Auto classes learn about the model as soon as they are loaded themselves (see ``mixlora.auto``).
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# A checkout keeps modeling/ and training/ beside this folder; an install keeps them inside it.
if not (_Path(__file__).parent / "modeling").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))

from mixlora.auto import register as _register

if TYPE_CHECKING:
    from mixlora.modeling.configuration_mixlora import MixLoraConfig
    from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
    from mixlora.modeling.processing_mixlora import MixLoraProcessor

__version__ = "0.1.0"

__all__ = [
    "MixLoraConfig",
    "MixLoraForConditionalGeneration",
    "MixLoraProcessor",
    "__version__",
    "default_checkpoint",
]

_LAZY_NAMES = {
    "MixLoraConfig": "mixlora.modeling.configuration_mixlora",
    "MixLoraForConditionalGeneration": "mixlora.modeling.modeling_mixlora",
    "MixLoraProcessor": "mixlora.modeling.processing_mixlora",
}


def default_checkpoint() -> str:
    """The folder of the small checkpoint that ships inside the package, ready for ``from_pretrained``.

    Raises:
        FileNotFoundError: this installation carries no checkpoint.
    """
    folder = _Path(__file__).resolve().parent / "default"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"this installation of mixlora has no embedded checkpoint: {folder}/config.json is missing"
        )
    return str(folder)


def __getattr__(name: str) -> Any:
    """Load a public name on first use, and keep it."""
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_LAZY_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


_register()
