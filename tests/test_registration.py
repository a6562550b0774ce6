"""`import mixlora` is light, and transformers' Auto classes know us whichever is imported first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK_CONFIG = """
from transformers import AutoConfig
config = AutoConfig.for_model("mixlora")
from mixlora import MixLoraConfig
assert type(config) is MixLoraConfig, type(config)
"""
CHECK_MODELS = """
import transformers
from mixlora import MixLoraConfig, MixLoraForConditionalGeneration
from mixlora.modeling.modeling_mixlora import MixLoraModel
for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"):
    expected = MixLoraModel if name == "AutoModel" else MixLoraForConditionalGeneration
    found = getattr(transformers, name)._model_mapping[MixLoraConfig]
    assert found is expected, (name, found)
"""
CHECK_PROCESSORS = """
import transformers
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from mixlora import MixLoraConfig, MixLoraProcessor
assert PROCESSOR_MAPPING[MixLoraConfig] is MixLoraProcessor
assert IMAGE_PROCESSOR_MAPPING[MixLoraConfig]["torchvision"].__name__ == "MixLoraImageProcessor"
assert FEATURE_EXTRACTOR_MAPPING[MixLoraConfig].__name__ == "MixLoraAudioProcessor"
"""
# Each starts a process in another way, some of them in the middle of transformers' own import.
BEGINNINGS = {
    "mixlora first, twice": "import mixlora\nfrom mixlora.auto import register\nregister()",
    "auto classes first": "from transformers import AutoModelForCausalLM, AutoProcessor\nimport mixlora",
    "our config first": "from mixlora import MixLoraConfig",
    "our model first": "from mixlora import MixLoraForConditionalGeneration",
    "our processor first": "from mixlora import MixLoraProcessor",
    "another model after": "import mixlora\nfrom transformers import LlamaForCausalLM",
    "base class after": "import mixlora\nfrom transformers import PreTrainedModel",
    "trainer after": "import mixlora\nfrom transformers import Trainer",
}


def run(program: str) -> None:
    """Run a program in a fresh interpreter at the root of the checkout.

    Raises:
        AssertionError: it failed; the message is what it wrote.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_import_is_light() -> None:
    run("""
import sys, mixlora
heavy = {"torch", "transformers", "numpy", "peft"} & set(sys.modules)
assert not heavy, heavy
assert set(mixlora.__all__) <= set(dir(mixlora))
assert {"MixLoraConfig", "MixLoraForConditionalGeneration", "MixLoraProcessor"} <= set(mixlora.__all__)
""")


def test_auto_models_do_not_load_our_network_before_use() -> None:
    run("""
import sys, mixlora
from transformers import AutoModelForCausalLM
assert "mixlora.modeling.modeling_mixlora" not in sys.modules
""")


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_auto_classes_know_us(beginning: str) -> None:
    run("\n".join((BEGINNINGS[beginning], CHECK_CONFIG, CHECK_MODELS, CHECK_PROCESSORS)))


def test_auto_model_builds_from_a_config_alone() -> None:
    """The stand-in of the network must do when nothing else has loaded the class."""
    run("""
import sys, mixlora
from transformers import AutoModelForMultimodalLM, AutoConfig
small = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = AutoConfig.for_model("mixlora", text_config=small)
assert "mixlora.modeling.modeling_mixlora" not in sys.modules
model = AutoModelForMultimodalLM.from_config(config)
assert type(model) is mixlora.MixLoraForConditionalGeneration
""")


def test_unknown_public_name_says_so() -> None:
    import mixlora

    with pytest.raises(AttributeError, match="no attribute 'MixLoraNothing'"):
        _ = mixlora.MixLoraNothing
