"""Exported code loads, and computes the same, in a process that can't see mixlora."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixlora import MixLoraForConditionalGeneration
from mixlora.checkpoints.export import export_code
from tests.modeling.model_fixtures import tiny_model
from tests.modeling.processor_fixtures import tiny_processor

LOAD = """
import sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "mixlora":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden)
import numpy as np, torch, transformers
from PIL import Image
folder, out = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
picture = {"type": "image", "image": Image.new("RGB", (6, 9), "red")}
clip = {"type": "audio", "audio": np.sin(np.arange(4000) / 7) * 0.3, "sampling_rate": 16000}
chats = [[{"role": "user", "content": content}] for content in ("Hello", [picture], [clip], [picture, clip])]
inputs = processor.apply_chat_template(
    chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
result = {"inputs": dict(inputs), "logits": []}
for name in ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        result["logits"].append(model(**inputs).logits)
torch.save(result, out)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "source")
    tiny_processor().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_exported_code_loads_without_mixlora(source: Path, tmp_path: Path) -> None:
    export_code(source, tmp_path / "exported")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "exported"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    model = MixLoraForConditionalGeneration.from_pretrained(source).eval()
    with torch.no_grad():
        expected = model(**result["inputs"]).logits
    for logits in result["logits"]:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_export_leaves_later_checkpoints_without_code(source: Path, tmp_path: Path) -> None:
    export_code(source, tmp_path / "exported")
    assert (tmp_path / "exported" / "router.py").is_file()
    tiny_model().save_pretrained(tmp_path / "later")
    tiny_processor().save_pretrained(tmp_path / "later")
    assert list((tmp_path / "later").glob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "later" / "config.json").read_text())


def test_export_refuses_what_it_would_overwrite(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an empty folder"):
        export_code(source, source)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export_code(tmp_path, tmp_path / "exported")
