"""The checkpoint of the package: half precision, or less where that changes nothing; the mean of two stages."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor
from scripts import export_default
from tests.training.training_fixtures import make_start


@pytest.mark.parametrize("share", [None, 0.25])
def test_matrices_that_float8_holds_are_stored_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    starts = [make_start(tmp_path / name) for name in ("one", "other")]
    model = MixLoraForConditionalGeneration.from_pretrained(starts[0])
    rounded = "model.vision_projector.up.weight"
    with torch.no_grad():
        model.get_parameter(rounded).copy_(model.get_parameter(rounded).to(torch.float8_e4m3fn))
    model.save_pretrained(starts[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0 if name == rounded else 1)
    model.save_pretrained(starts[1])
    options = ["--mean", starts[1], *(["--share", str(share)] if share else [])]
    monkeypatch.setattr(sys, "argv", ["export", starts[0], str(tmp_path / "out"), *options])
    export_default.main()
    before, stored = (load_file(Path(folder) / "model.safetensors") for folder in (starts[0], tmp_path / "out"))
    kinds = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert kinds == {rounded}
    assert {tensor.dtype for name, tensor in stored.items() if name not in kinds} == {torch.float16}
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    for name, parameter in again.named_parameters():
        wanted = before[name] + (0 if name == rounded else share or 0.5)
        torch.testing.assert_close(parameter, wanted, atol=2e-3, rtol=1e-3)
    assert MixLoraProcessor.from_pretrained(tmp_path / "out").image_seq_length == 4


def test_matrices_of_a_group_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = make_start(tmp_path / "start")
    command = ["export", start, str(tmp_path / "out"), "--round"]
    monkeypatch.setattr(sys, "argv", [*command, "vision_projector"])
    export_default.main()
    before, stored = (load_file(Path(folder) / "model.safetensors") for folder in (start, tmp_path / "out"))
    matrices = {name for name, tensor in before.items() if "vision_projector" in name and tensor.dim() > 1}
    assert matrices == {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    for name in matrices:
        assert torch.equal(stored[name].float(), before[name].to(torch.float8_e4m3fn).float())
    monkeypatch.setattr(sys, "argv", [*command, "vision_detail"])
    with pytest.raises(SystemExit):
        export_default.main()
