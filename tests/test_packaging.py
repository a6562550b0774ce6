"""Guards on the layout: side-by-side folders that install as one package."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]  # package -> folder at the root
# Our own root folder shares its name with another project on PyPI; the README warns about that.
DEPENDENCY_NAMES = {
    *("accelerate", "datasets", "deepspeed", "flash_attn", "gguf", "gradio", "hypothesis", "jiwer", "mypy", "numpy"),
    *("peft", "PIL", "pytest", "safetensors", "soundfile", "timm", "tokenizers", "torch", "torchao", "torchaudio"),
    *("torchvision", "transformers", "trl", "typer", "yaml"),
}
# Importing these libraries needs an extra.
EXTRA_MODULES = (
    *("datasets", "gguf", "torchao", "deepspeed", "flash_attn", "gradio", "pytest", "hypothesis", "trl"),
    *("matplotlib", "faster_whisper", "pocketsphinx", "rapidocr_onnxruntime"),
    *("fastapi", "starlette", "uvicorn", "httpx", "prometheus_client", "pydantic", "playwright"),
)
# Modules of ours behind a command that asks for its extra first; every other one imports with the base dependencies.
BEHIND_EXTRAS = (
    *("mixlora.demo.app", "mixlora.demo.page", "mixlora.demo.run"),
    *(
        f"mixlora.serving.{name}"
        for name in ("conversation", "exposition", "fetching", "guard", "openai_form", "patience")
    ),
    *("mixlora.serving.serve", "mixlora.serving.server"),
)


def package_folder(package: str) -> Path:
    """The folder in the checkout that holds a package."""
    root = max((name for name in FOLDERS if (package + ".").startswith(name + ".")), key=len)
    return ROOT.joinpath(FOLDERS[root], *package[len(root) :].lstrip(".").split("."))


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours, by name and file."""
    for package in SETUPTOOLS["packages"]:
        for file in sorted(package_folder(package).glob("*.py")):
            yield (package if file.stem == "__init__" else f"{package}.{file.stem}"), file


def python_files() -> list[Path]:
    """Every Python file of ours in the checkout."""
    places = [*FOLDERS.values(), "tests", "scripts", "examples", "benchmarks"]
    return sorted(file for place in places for file in (ROOT / place).rglob("*.py"))


def test_packages_are_all_listed() -> None:
    """A package missing from the list would be left out of the wheel without a word."""
    found = set()
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *file.parent.relative_to(ROOT / folder).parts)))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_folders_with_python_files_are_packages() -> None:
    for folder in FOLDERS.values():
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"


def test_no_bare_imports() -> None:
    """`import modeling` works at the root and makes a second copy of each class: always mixlora.modeling."""
    bare = {folder for package, folder in FOLDERS.items() if package != folder} | {"demo"}
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in bare, f"{file.relative_to(ROOT)} imports {name}: use mixlora.{name}"


def test_modeling_can_be_exported_as_custom_code() -> None:
    """Flat, single-dot imports of modules' names, nothing of ours from outside."""
    folder = ROOT / FOLDERS["mixlora.modeling"]
    assert [file.name for file in folder.iterdir() if file.is_dir() and file.name != "__pycache__"] == []
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{file.name}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "mixlora", f"{file.name}:{node.lineno}"
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "mixlora" for alias in node.names), f"{file.name}:{node.lineno}"


def test_no_file_is_named_like_a_dependency() -> None:
    """Run by path, such a file would shadow the library."""
    taken = {name.lower() for name in DEPENDENCY_NAMES} | sys.stdlib_module_names
    for _, file in modules():
        assert file.stem == "__init__" or file.stem.lower() not in taken, f"{file.relative_to(ROOT)} shadows a library"


def test_every_module_imports_with_base_dependencies() -> None:
    """One process imports them all, with the libraries of the extras hidden but those that the hub's client needs."""
    needed = {re.split(r"[^\w-]", each)[0] for each in requires("huggingface_hub") or []}
    program = (
        "import importlib, sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        f"hidden = {set(EXTRA_MODULES) - needed}\n"
        "PathFinder.find_spec = lambda name, *a, **k: None if name in hidden else find(name, *a, **k)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    names = [name for name, _ in modules() if not name.endswith("__main__") and name not in BEHIND_EXTRAS]
    result = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_checkout_is_what_is_imported() -> None:
    for name, file in modules():
        if "." not in name or name.count(".") == 1 and file.stem == "__init__":
            assert Path(importlib.import_module(name).__file__ or "").resolve() == file.resolve()


def test_package_data_is_there() -> None:
    assert (ROOT / "mixlora" / "py.typed").is_file()
    assert "default/**/*" in SETUPTOOLS["package-data"]["mixlora"]
    assert "recipes/**/*" in SETUPTOOLS["package-data"]["mixlora.training"]
    assert "*.jinja" in SETUPTOOLS["package-data"]["mixlora.evaluation"]


def test_torch_family_is_pinned_together() -> None:
    """torch, torchaudio and torchvision must come from the same build."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins["torch"] == pins["torchaudio"] == "2.11.0" and pins["torchvision"] == "0.26.0"


def test_another_project_of_that_name_is_not_installed() -> None:
    """PyPI's `mixlora` has the same import name and would overwrite ours."""
    with pytest.raises(PackageNotFoundError):
        requires("mixlora")


def test_readme_names_tests_that_exist() -> None:
    """Each of the six promises names a test that would fail if it broke."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) >= 6
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
