"""What a running stage shows: a bar, a line for each point of the log, and curves for TensorBoard."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from mixlora.training.settings import RecipeError


class Progress(TrainerCallback):
    """A bar with the time that is left, and at each point of the log a line with the tokens a second.

    Args:
        shown: by one process alone.
    """

    def __init__(self, shown: bool = True):
        self.shown = shown
        self._bar: Any = None
        self._last: tuple[float, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.shown:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
        self._last = time.monotonic(), self._tokens(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The line; speed is that since the last one."""
        if self._bar is None or not logs or "loss" not in logs or self._last is None:
            return
        now, tokens = time.monotonic(), int(logs.get("tokens", 0))
        speed = (tokens - self._last[1]) / max(now - self._last[0], 1e-9)
        self._last = now, tokens
        left = _clock((state.max_steps - state.global_step) * self._seconds_a_step())
        self._bar.write(
            f"  step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.4f}  "
            f"gradient {logs.get('grad_norm', 0.0):.3g}  learning rate {logs.get('learning_rate', 0.0):.3g}  "
            f"{speed:,.0f} tokens/s  {left} left"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _seconds_a_step(self) -> float:
        figures = self._bar.format_dict
        return figures["elapsed"] / max(1, figures["n"] - figures["initial"])

    @staticmethod
    def _tokens(state: Any) -> int:
        """Tokens until the last point of the log."""
        return next((int(point["tokens"]) for point in reversed(state.log_history) if "tokens" in point), 0)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class Board(TrainerCallback):
    """Writes every figure of the log for TensorBoard.

    Args:
        folder: of its event files.

    Raises:
        RecipeError: it is not installed.
    """

    def __init__(self, folder: Path):
        if find_spec("tensorboard") is None:
            raise RecipeError("tensorboard: true needs that package, pip install tensorboard")
        self.folder = folder
        self._writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Points of a killed run that come again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        if state.is_world_process_zero:
            self._writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value in (logs or {}).items() if self._writer is not None else ():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._writer is not None:
            self._writer.close()
