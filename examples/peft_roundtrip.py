"""An adapter travels to PEFT and back: the same logits from PEFT's own loader on a plain Llama, and from ours.

    python examples/peft_roundtrip.py [--model DIR] [--adapter NAME]

The Llama is transformers' class with the weights of the checkpoint's decoder; it needs no line of mixlora any more.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def plain_llama(model: Any) -> Any:
    """transformers' Llama with the decoder of a model.

    Raises:
        ValueError: the decoder has parts that Llama has not.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixlora.modeling.base_checkpoint import is_base_tensor

    text = model.config.text_config
    differs = text.fused_projections or text.qk_norm or text.attention_bias != text.attention_output_bias
    if differs or text.norm_epsilon is not None or text.sliding_window is not None or not text.is_gated_act:
        raise ValueError("this decoder is not laid out as a Llama; load the adapter folder on its own base instead")
    fields = set(LlamaConfig.__dataclass_fields__) - {"architectures", "dtype"}
    config = LlamaConfig(**{name: value for name, value in text.to_dict().items() if name in fields})
    llama = LlamaForCausalLM(config).to(model.dtype).eval()
    llama.load_state_dict(
        {
            name.replace("model.language_model.", "model.").replace(".base_layer.", "."): value
            for name, value in model.state_dict().items()
            if is_base_tensor(name)
        }
    )
    return llama


def main(argv: list[str] | None = None) -> None:
    """Prints how far the logits differ, in standard deviations of the logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; by default the one inside the package")
    parser.add_argument("--adapter", default="vision")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch
    from peft import PeftModel

    from mixlora import MixLoraForConditionalGeneration, default_checkpoint

    torch.manual_seed(args.seed)
    model = MixLoraForConditionalGeneration.from_pretrained(args.model or default_checkpoint(), dtype=torch.float32)
    placeholders = {model.config.image_token_id, model.config.audio_token_id}
    words = [token for token in range(model.config.text_config.vocab_size) if token not in placeholders]
    ids = torch.tensor(words)[torch.randint(len(words), (2, 16))]

    @torch.no_grad()
    def logits(adapter: str | None) -> torch.Tensor:
        index = -1 if adapter is None else model.router.names.index(adapter)
        return model.eval()(input_ids=ids, adapter_ids=torch.full((len(ids),), index)).logits

    ours, base = logits(args.adapter), logits(None)
    with TemporaryDirectory() as folder:
        model.save_adapter(folder, args.adapter)
        print("saved:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(plain_llama(model), folder).eval()(input_ids=ids).logits
        model.load_adapter(folder, "again")
    for what, other in (("the base alone", base), ("PEFT on a plain Llama", theirs), ("loaded back", logits("again"))):
        print(f"{what:<22} differs by {(ours - other).abs().max() / ours.std():.1e} standard deviations")


if __name__ == "__main__":
    main()
