"""Ctrl-C and SIGTERM while a model trains: finish the step, write a checkpoint, stop.

    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop:
        trainer.train()          # raises TrainingInterrupt once the checkpoint is written

A second signal stops at once; the base is sound even then, since it is never written to but in the
update, and the checkpoints are whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from transformers import TrainerCallback

from zofo.saved.layout import CHECKPOINT_PREFIX

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupt(KeyboardInterrupt):
    """Training stopped because of a signal.

    Attributes:
        signum: the signal.
        checkpoint: where training can go on from; None if it stopped at once, or had ended.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.checkpoint = signum, checkpoint

    @property
    def exit_code(self) -> int:
        """As a shell tells it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class StopOnSignal(TrainerCallback):
    """Stops training with a checkpoint at the end of the step in which a signal came.

    As a context manager it handles the signals, in the main thread only, and puts the handlers back
    that were there. Without it, `request` asks for the same.

    Args:
        signals: which.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.signals = tuple(signals)
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def request(self, signum: int = signal.SIGINT) -> None:
        """Ask to stop; the second time, stop at once.

        Raises:
            TrainingInterrupt: the second time.
        """
        if self.signum is not None:
            raise TrainingInterrupt(signum)
        self.signum = signum

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Have a checkpoint written if asked to stop."""
        if self.signum is not None:
            control.should_save = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Likewise, if the signal came while the dev rows were scored."""
        return self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, now that the checkpoint is written.

        Raises:
            TrainingInterrupt: if asked to stop.
        """
        if self.signum is not None:
            folder = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
            raise TrainingInterrupt(self.signum, folder)

    def __enter__(self) -> StopOnSignal:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                # What a parent told to ignore (nohup, a job in the background) stays ignored.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if error is None and self.signum is not None:
            raise TrainingInterrupt(self.signum)

    def _handle(self, signum: int, frame: Any) -> None:
        self.request(signum)
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        # Not print: a handler may run in the middle of another print.
        with contextlib.suppress(OSError):
            text = f"\n{name}: finishing the step and saving; once more stops at once\n"
            os.write(2, text.encode())
