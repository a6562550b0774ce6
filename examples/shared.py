"""What several examples need: the samples that ship with the package, and a decoder where none is given."""

from pathlib import Path

import mixlora

SAMPLES = Path(mixlora.__file__).parent / "default" / "samples"
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def decoder_folder(given: Path | None, scratch: Path) -> Path:
    """The decoder to build on: `given`, or a tiny Llama with random weights, saved under `scratch`."""
    if given is not None:
        return given
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = scratch / "tiny-llama"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder
