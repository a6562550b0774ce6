"""How long a user waits before anything happens: `mixlora --help` and `import mixlora` beside `import transformers`.

python -m benchmarks.startup [--repeat 7] [--quick] [--json FILE]

Each is a process of its own. Also shown, and without a peer: our classes loaded, which takes torch.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import measure

CODE = {
    "import transformers": "import transformers",
    "import mixlora": "import mixlora",
    "mixlora --help": "from mixlora.cli import main; main(['--help'])",
    "import torch": "import torch",
    "our model's class": "from mixlora import MixLoraForConditionalGeneration",
    "its peer's class": "from transformers import Phi4MultimodalForCausalLM",
}


def way(code: str) -> Callable[[], Any]:
    """A fresh interpreter that runs `code`."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints seconds and the ratios."""
    args, _ = measure.parse(measure.options(__doc__, repeat=7, shapes="full"), argv)
    times = measure.alternate({name: way(code) for name, code in CODE.items()}, args.repeat)
    ratios = {name: measure.ratio(times, name, "import transformers") for name in ("mixlora --help", "import mixlora")}
    middle = measure.medians(times)
    print(measure.table(("", "seconds"), list(middle.items())))
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} of import transformers")
    return measure.finish("startup", args, {"medians": middle, "ratios": ratios})


if __name__ == "__main__":
    main()
