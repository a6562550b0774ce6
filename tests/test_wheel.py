"""An installed wheel works outside the checkout, with the checkpoint and the recipes that it carries."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, "-c", "from mixlora.cli import main; main()"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, built from a copy so that the checkout stays as it is."""
    source, wheels, unpacked = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for folder in ("mixlora", "modeling", "training", "demo"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("mixlora_multimodal-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def run_away(site: Path, folder: Path, *command: str) -> str:
    """Run a command in another folder, where only the wheel's copy is in reach, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_puts_one_name_into_site_packages(site: Path) -> None:
    assert [entry.name for entry in site.iterdir() if not entry.name.endswith(".dist-info")] == ["mixlora"]


def test_wheel_holds_every_file(site: Path) -> None:
    """Every module, recipe and file of the checkpoint."""
    for source, target in (("mixlora", ""), ("modeling", "modeling"), ("training", "training"), ("demo", "demo")):
        for file in (ROOT / source).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                assert (site / "mixlora" / target / file.relative_to(ROOT / source)).is_file(), file


def test_wheel_imports_its_own_copy(site: Path, tmp_path: Path) -> None:
    program = "import mixlora.modeling.configuration_mixlora as m; print(m.__file__)"
    printed = run_away(site, tmp_path, sys.executable, "-c", program)
    assert Path(printed.strip()) == site / "mixlora" / "modeling" / "configuration_mixlora.py"


def test_wheel_chats(site: Path, tmp_path: Path) -> None:
    samples = site / "mixlora" / "default" / "samples" / "rows.jsonl"
    printed = run_away(site, tmp_path, *RUN, "chat", "--batch", str(samples), "--json")
    answers = [json.loads(line) for line in printed.splitlines()]
    assert len(answers) == len(samples.read_text(encoding="utf-8").splitlines())
    assert all(answer["text"] for answer in answers)
