"""Stop training on Ctrl-C or SIGTERM, after the current step and with a checkpoint.

    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop:
        trainer.train()  # raises TrainingInterrupt after it has written the checkpoint

Of several processes, all stop after the same step, whichever received the signal. A second signal
stops training at once. The weights are valid even then, because evaluations never write to the
base. Every checkpoint on disk is complete.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from zofo.saved.layout import CHECKPOINT_PREFIX

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupt(KeyboardInterrupt):
    """Training stopped because of a signal.

    Attributes:
        signum: number of the signal.
        checkpoint: the checkpoint from which training can resume; None if training stopped at once
            or had already ended.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.checkpoint = signum, checkpoint

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class StopOnSignal(TrainerCallback):
    """Stops training with a checkpoint at the end of the step in which a signal arrived.

    As a context manager it installs signal handlers and restores the previous ones at the end.
    Python allows this in the main thread only. In other threads, call `request` instead.

    Args:
        signals: the signals to handle.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.signals = tuple(signals)
        self.signum: int | None = None
        self._agreed: int | None = None  # the signal for which all processes stop
        self._previous: dict[int, Any] = {}

    def request(self, signum: int = signal.SIGINT) -> None:
        """Request a stop. The second request stops training at once.

        Raises:
            TrainingInterrupt: on the second request.
        """
        if self.signum is not None:
            raise TrainingInterrupt(signum)
        self.signum = signum

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Request a checkpoint if a stop was requested."""
        self._agreed = self._of_all(args)
        if self._agreed is not None:
            control.should_save = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Request a checkpoint if the stop was requested during an evaluation."""
        return self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the checkpoint is written.

        Raises:
            TrainingInterrupt: if a stop was requested.
        """
        signum = self.signum if args.world_size == 1 else self._agreed
        if signum is not None:
            folder = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
            raise TrainingInterrupt(signum, folder)

    def _of_all(self, args: Any) -> int | None:
        """The signal, which one process may receive a step later than another."""
        if args.world_size == 1:
            return self.signum
        signum = torch.tensor(self.signum or 0, device=args.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum) or None

    def __enter__(self) -> StopOnSignal:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                # A signal that the parent process set to be ignored (nohup) stays ignored.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for signum, handler in self._previous.items():
            # Python has no object for a handler that other code installed in C, and returns None.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        # The signal may have arrived after the last checkpoint.
        if error is None and self.signum is not None:
            raise TrainingInterrupt(self.signum)

    def _handle(self, signum: int, frame: Any) -> None:
        self.request(signum)
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        if os.environ.get("RANK", "0") != "0":
            return
        # The handler may interrupt a print. os.write does not use the buffer of that print.
        with contextlib.suppress(OSError):
            text = f"\n{name}: finishing the step and saving; a second signal stops at once\n"
            os.write(2, text.encode())
