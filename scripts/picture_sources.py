"""The packages that the picture scripts read: stamps, clip art, emoji, fonts and small handwritten digits.

`prepare_words.py` takes its faces from those named fonts-*.
"""

from __future__ import annotations

from sources import Source

PICTURES = {
    "fonts-aenigma": Source(
        "apt", "0.0.20080511+dfsg-4", "c7f33a4e5932af82a92c81a5a993a1d117c4309b47532cb0d9c3ad34bc54f5a8"
    ),
    "fonts-breip": Source("apt", "1:0.5.1-3", "1f0ea903300b89cb55d107ee4a12be82118ada0384d8bd9db0aad8e1f8c1aa49"),
    "fonts-bwht": Source("apt", "0.1-3", "5dd1d688f690fcafac659761c20cade5ef49ffc20fd7ba6b953d7d38d5165839"),
    "fonts-cantarell": Source("apt", "0.303.1-1", "8fdf5687d9e2ce70456664519025a6b48fbaaadbc5b1cfbf8b09f72c2dc5f09b"),
    "fonts-comic-neue": Source("apt", "2.51-4", "6f002dc90d62fde01a2b51f333c09dc6c21ffbfc6ca22d05a84cc049b083c826"),
    "fonts-courier-prime": Source(
        "apt", "0+git20190115-3", "6f827dd190446abbf83972f01e3f0db2c980e73bd6fb85b56d9d9a8f1755149f"
    ),
    "fonts-crosextra-caladea": Source(
        "apt", "20200211-1", "dd51af7629df5a2f3799f889cdf63d5abdda32e94e5de59398f728d98604a240"
    ),
    "fonts-crosextra-carlito": Source(
        "apt", "20220224-1", "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7"
    ),
    "fonts-dejavu-core": Source("apt", "2.37-6", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"),
    "fonts-dkg-handwriting": Source(
        "apt", "0.17-1", "82ee9beae0313e11761af7bb81f4c3fdc91ddd6122ab78490e1b103b9f502709"
    ),
    "fonts-dustin": Source("apt", "20030517-14", "4f74523ed2f3987279478a06933694ea91dadbe607b1c4077a25ca48c52ad3a7"),
    "fonts-ebgaramond": Source(
        "apt", "0.016+git20210310.42d4f9f2-1", "2780e32df19b909823425b3e21c2f2f2a1717bbdd96f33fc59a252a308903fa2"
    ),
    "fonts-ecolier-court": Source("apt", "1.00-6", "8ce2aba588adffc3bff453dae91af24b26ba7d0ce458127ad38f68d4fd36415b"),
    "fonts-femkeklaver": Source("apt", "1.0-4", "93b34dc4752ac43634fffb93c985366a34dea16886287ae405d5b3e87cd9a7b4"),
    "fonts-freefont-ttf": Source(
        "apt", "20120503-10", "4ca1c21ebc479198a3a5879d236c8317d6f7b2f1c403f7890e24c02eead05615"
    ),
    "fonts-humor-sans": Source("apt", "1.0-4", "84bd0c40b65dc345e05396a4ffb64282c14fbbb6e7079126eeabc92bd9fe7311"),
    "fonts-inconsolata": Source(
        "apt", "001.010-6", "bb5015c631cd47aa7d9d6e0ecd101f0e1234300f935e7719ea32ed9b640f0ac4"
    ),
    "fonts-isabella": Source("apt", "1.202-4", "ee0c30fd0b3fc6f0ab7cf1c1449e55b898fc77d43cd4afc07e936d472e0f80b3"),
    "fonts-kristi": Source("apt", "20101220-1", "03cdbe9ca6cb5ea863ad652ea94313666f275de526c3cb01e252da93019001c2"),
    "fonts-lato": Source("apt", "2.0-2.1", "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5"),
    "fonts-liberation2": Source("apt", "2.1.5-1", "35ffaa54f117e633e89a5da89af235a073b34dbe582726fbf6989568f7fd9bda"),
    "fonts-linuxlibertine": Source(
        "apt", "5.3.0-6", "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087"
    ),
    "fonts-lobstertwo": Source("apt", "2.0-2.1", "cd24c217d07c4688e47d6a5bf8e8909638855f4278ba1468e100a589bd15665a"),
    "fonts-open-sans": Source("apt", "1.11-2", "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485"),
    "fonts-opendyslexic": Source(
        "apt", "20160623-4", "e41cbb53cb1e6981c89efa34c79e553d19125020c4708f9d5613c02bfaf3bf0e"
    ),
    "fonts-roboto-unhinted": Source(
        "apt", "2:0~20170802-3", "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91"
    ),
    "fonts-rufscript": Source("apt", "010-6", "72a7300913e52795b7915ac5873eda633a80dcb49bb590711cde83b270b0f606"),
    "fonts-sjfonts": Source("apt", "2.1-2", "f6fdb38cb13a7772ebbb03db21ca118125b136caa170e2a77b17d1f9f4c504f0"),
    "fonts-tomsontalks": Source("apt", "1.1-9", "582a3a540696c8bbcf572c2e6c32d5c3e7ba6a156375b934bde9e9babec2908b"),
    "fonts-urw-base35": Source(
        "apt", "20200910-7", "93e4997c99c4c31ea88c5d37e2259af0a0c826b9358931d5a69f794f7f0c73ac"
    ),
    "fonts-vollkorn": Source("apt", "4.105-2", "0c7039de3ede6c96727829635c5b10a536114029cbddf98e14716578d936307f"),
    "@iconify-json/emojione": Source(
        "npm", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "@iconify-json/emojione-v1": Source(
        "npm", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"
    ),
    "@iconify-json/fluent-emoji": Source(
        "npm", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "@iconify-json/fluent-emoji-flat": Source(
        "npm", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "@iconify-json/fxemoji": Source(
        "npm", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
    "@iconify-json/noto": Source("npm", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/noto-v1": Source(
        "npm", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "@iconify-json/openmoji": Source(
        "npm", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"
    ),
    "@iconify-json/twemoji": Source(
        "npm", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "openclipart-png": Source(
        "apt", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"
    ),
    "python3-sklearn": Source(
        "apt", "1.2.1+dfsg-1", "ca0c6be401d14871c7e93cfdd8d1f561595dc65e6e2ad2501d568aee7f7efc58"
    ),
    "tuxpaint-stamps-default": Source(
        "apt", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
    ),
}


def font_packages() -> tuple[str, ...]:
    """Names of the packages that hold fonts."""
    return tuple(name for name in PICTURES if name.startswith("fonts-"))
