"""A recipe read from YAML, with `key=value` overrides from the command line."""

import dataclasses
import types
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

import mixlora
from mixlora.training.settings import nearest
from mixlora.training.stages import Recipe, RecipeError, Stage

PACKAGED = Path(__file__).parent / "recipes"
BESIDE = "recipe:"
"""In front of a path: it counts from the recipe's folder, not from where one works."""
EMBEDDED = "embedded"


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given as a path or as the name of one that ships with the package.

    Raises:
        RecipeError: neither a file nor a packaged name.
    """
    for path in (Path(name), PACKAGED / f"{name}.yaml"):
        if path.is_file():
            return path
    packaged = sorted(str(path.relative_to(PACKAGED).with_suffix("")) for path in PACKAGED.rglob("*.yaml"))
    raise RecipeError(f"{name}: no such recipe file, and not a packaged recipe; those are {', '.join(packaged)}")


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        path: a YAML file.
        overrides: `key=value` for the recipe, `STAGE.key=value` for a stage; `stages=[NAME, ...]` keeps only these.
            The value is YAML.

    Raises:
        RecipeError: not YAML, an unknown key (the nearest right one is named) or a value of the wrong kind.
    """
    raw = _read(path.read_bytes(), str(path))
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list):
        raise RecipeError(f"{path}: expected a mapping with a list of stages")
    if not all(isinstance(stage, dict) for stage in raw["stages"]):
        raise RecipeError(f"{path}: each stage must be a mapping")
    for override in overrides or []:
        _override(raw, override)
    _resolve(raw, path.parent)
    return _build(Recipe, raw, str(path))


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, the first would be passed over in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, after a look at the keys that are written there."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(text: bytes, where: str) -> Any:
    """What YAML holds; RecipeError where it is none, in one line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _resolve(raw: dict[str, Any], folder: Path) -> None:
    """Writes out, in place, paths that count from the recipe, and the name of the embedded checkpoint."""

    def path_of(text: Any) -> Any:
        if text == EMBEDDED:
            return mixlora.default_checkpoint()
        return str(folder / text.removeprefix(BESIDE)) if str(text).startswith(BESIDE) else text

    raw |= {key: path_of(raw[key]) for key in ("model",) if key in raw}
    for stage in raw["stages"]:
        stage |= {key: path_of(stage[key]) for key in ("teacher",) if key in stage}
        sources = stage.get("data")
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict) and "path" in source:
                source["path"] = path_of(source["path"])


def _override(raw: dict[str, Any], override: str) -> None:
    """Applies one `key=value` to the YAML tree in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value or STAGE.key=value")
    value = _read(text.encode(), f"override {override!r}: the value")
    stages = {str(stage.get("name")): stage for stage in raw["stages"]}
    name, dot, inner = key.partition(".")
    if dot:
        if name not in stages:
            raise RecipeError(f"override {override!r}: no stage {name!r}{nearest(name, stages)}")
        _check_key(Stage, inner, f"override {override!r}")
        stages[name][inner] = value
    elif key == "stages":
        chosen = value if isinstance(value, list) else [value]
        for name in chosen:
            if name not in stages:
                raise RecipeError(f"override {override!r}: no stage {name!r}{nearest(str(name), stages)}")
        raw["stages"] = [stage for stage in raw["stages"] if stage.get("name") in chosen]
    else:
        _check_key(Recipe, key, f"override {override!r}")
        raw[key] = value


def _build(kind: type, raw: Any, where: str) -> Any:
    """A dataclass of `kind` from a mapping, every field converted to its annotated type."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping, got {raw!r}")
    hints = get_type_hints(kind)
    for key in raw:
        _check_key(kind, str(key), where)
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in raw:
            raise RecipeError(f"{where}: {entry.name} is missing")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`: a list, a dataclass, a bool, a number (also written `2e-3`) or a string."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        return [_convert(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if get_origin(hint) is types.UnionType:  # of a single value and a mapping
        single, mapping = get_args(hint)
        return _convert(mapping if isinstance(value, dict) else single, value, where)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a mapping, got {value!r}")
        return {key: _convert(get_args(hint)[1], item, f"{where}: {key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 2e-3 as a string
        except ValueError:
            number = float("nan")
        if number == number and (hint is float or number.is_integer()):
            return hint(number)
    raise RecipeError(f"{where}: expected {hint.__name__}, got {value!r}")


def _check_key(kind: type, key: str, where: str) -> None:
    known = [entry.name for entry in dataclasses.fields(kind)]
    if key not in known:
        raise RecipeError(f"{where}: unknown key {key!r}{nearest(key, known)}")
