"""Write the checkpoints of a trainer, and resume from them.

A checkpoint holds the adapter and the trajectory of the base, because an adapter fits only the base
that it was trained with. It also holds the sums behind the logged losses, which Trainer resets when
it resumes. Trainer writes it into a hidden folder, which is renamed once it is complete.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from zofo.disk.copied import CopyOnDisk
from zofo.disk.files import read_json_object, write_json
from zofo.disk.folders import writing_folder
from zofo.errors import UserError
from zofo.models.loading import copy_weights
from zofo.models.saved_adapters import load_adapter, save_prompt_encoder, sort_sets
from zofo.optim.blocks import is_peft, split_parameters
from zofo.optim.gradient_bytes import GradientBytes
from zofo.optim.methods import get_method
from zofo.optim.moved import saving_adapter
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.perturb.shards import gathered
from zofo.saved.buffers import load_buffers, save_buffers
from zofo.saved.checkpoint import save_history
from zofo.saved.checkpoint_folders import (
    find_bad_pickle,
    newest_whole,
    remove_leftovers,
    rotate,
)
from zofo.saved.layout import ACCOUNTS_FILE, CHECKPOINT_PREFIX, STATE_FILE
from zofo.trainer.checks import has_shards, is_sharded
from zofo.trainer.trainer_mixin import TrainerMixin


@contextmanager
def naming_damage(folder: str | Path | None) -> Iterator[None]:
    """Turn an error of reading Trainer's own files, which are pickles, into one `UserError`.

    Torch reads only tensors, numbers and containers from them, and runs no code.

    Raises:
        UserError: for any `Exception`; it names the file that cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        bad = find_bad_pickle(Path(folder or ""))
        if bad is None:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            problem = f"{folder} cannot be restored ({said})"
        else:
            problem = f"{bad} is damaged, or holds objects other than tensors and numbers"
        raise UserError(f"{problem}; resume from another checkpoint") from error


class RestoreAccounts(TrainerCallback):
    """Restores the sums after Trainer has set them to 0."""

    def __init__(self, trainer: CheckpointMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the sums; Trainer calls this when training begins."""
        self.trainer._restore_accounts()


class CheckpointMixin(TrainerMixin):
    """Saves and restores a hybrid trainer. `HybridMixin` sets its attributes."""

    _checkpoints_folder: Path | None  # the hidden folder while a checkpoint is written
    _resumed_accounts: dict[str, Any] | None  # read from the checkpoint, not yet restored
    _gradient_bytes: GradientBytes

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; `resume_from_checkpoint=True` takes the newest whole checkpoint.

        The copy of the original base is removed when training has ended without an error.
        """
        folder = self._output_folder
        if self.args.should_save:
            remove_leftovers(folder)
        if resume_from_checkpoint is True:
            newest = newest_whole(folder, lambda text: warnings.warn(text, stacklevel=3))
            resume_from_checkpoint = True if newest is None else str(newest)
        self._resumed_accounts = None
        self._keep_original()  # before Trainer reads the weights of a checkpoint
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._history is not None:
            self._history.drop_copies()
        return output._replace(training_loss=output.metrics["train_loss"])

    def _keep_original(self) -> None:
        """Make sure that the original base can be read, if an anchor will need it."""
        options = self.hybrid_options
        is_needed = options.base_anchor and get_method(options.method).base == "zeroth"
        if is_needed and self._original is None and self.optimizer is None:
            self._original = (
                CopyOnDisk(split_parameters(self.model).base, self._output_folder)
                if self._original_base is None
                else self._original_base()
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (or the model) and the trajectory, if the base has one."""
        adapter = split_parameters(self.model).adapter if has_shards(self) else {}
        folder = Path(output_dir or self._output_folder)
        with gathered(self.model, adapter.values()):
            with saving_adapter(self.model), warnings.catch_warnings():
                # The copy of the embeddings that peft then writes is not read: the base has a
                # record.
                warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
                super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                save_prompt_encoder(self.model, folder)
        if not self.args.should_save:
            return
        if is_peft(self.model):
            sort_sets(self.model, folder)
        if self._history is not None:
            save_history(folder, self.model, self._history.optimizer)
        elif is_peft(self.model):
            save_buffers(folder, self.moved_buffers)

    @property
    def moved_buffers(self) -> dict[str, Tensor]:
        """The buffers that training has changed: name without adapter -> value."""
        return {} if self._hybrid is None else self._hybrid.buffers.moved()

    def _load_buffers(self, folder: Path) -> None:
        """Set the buffers of a checkpoint; the file of a model without adapter holds them."""
        if is_peft(self.model) and not is_sharded(self):
            path = folder / TRAJECTORY_FILE
            record = Trajectory.load(path)[1] if path.exists() else None
            self.hybrid_optimizer.buffers.restore_original()
            load_buffers(folder, self.model, record)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints_folder or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint as Trainer does, in a hidden folder that is renamed at the end."""
        args, state = self.args, self.state
        if is_sharded(self):
            super()._save_checkpoint(model, trial)
            return
        run_folder = Path(self._get_output_dir(trial))
        place = run_folder / f"{CHECKPOINT_PREFIX}{state.global_step}"
        if trial is not None:
            run_folder.mkdir(exist_ok=True)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(place)
        # Trainer would upload the hidden folder, so the upload waits until the folder is renamed.
        pushes, args.push_to_hub = args.push_to_hub, False
        try:
            with self._staged(place) as staged:
                self._checkpoints_folder = staged.parent
                super()._save_checkpoint(model, trial)
                accounts = self._accounts()
                self._name_best(run_folder, place)
                if args.should_save:
                    state.save_to_json(str(staged / STATE_FILE))
                    write_json(staged / ACCOUNTS_FILE, accounts)
        finally:
            self._checkpoints_folder, args.push_to_hub = None, pushes
        if not args.should_save:
            return
        if self._history is not None:
            self._history.take_snapshot()
        # Older checkpoints go last, so that a kill at any time leaves a whole one.
        newest, best = state.global_step, state.best_global_step
        rotate(run_folder, args.save_total_limit, newest=newest, best=best)
        if pushes:
            self._push_from_checkpoint(str(place))

    @contextmanager
    def _staged(self, place: Path) -> Iterator[Path]:
        """The hidden folder of `writing_folder`, which all processes write their files to."""
        if self.args.world_size == 1:
            with writing_folder(place) as staged:
                yield staged
            return
        found: list[str | None] = [None]
        with writing_folder(place) if self.args.should_save else nullcontext() as own:
            if own is not None:
                found = [str(own)]
            dist.broadcast_object_list(found, src=0)
            yield Path(str(found[0]))
            dist.barrier()  # The folder is renamed after the last process has written.

    def _name_best(self, run_folder: Path, coming: Path | None = None) -> None:
        """Point to the best checkpoint in this run folder, which may have been moved."""
        step = self.state.best_global_step
        best = run_folder / f"{CHECKPOINT_PREFIX}{step}"
        if step and (best == coming or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _accounts(self) -> dict[str, Any]:
        """The sums behind the logged losses and bytes."""
        processes = self.hybrid_optimizer.processes
        return {
            "base_bytes_sent": 0 if processes is None else processes.bytes_sent,
            "gradient_bytes_sent": self._gradient_bytes.sent,
            # The mean over the processes, as Trainer logs it.
            "loss_since_log": float(self.accelerator.gather(self._tr_loss).mean()),
            "last_logged_step": self._globalstep_last_logged,
            "loss_until_log": self._total_loss_scalar,
        }

    def _restore_accounts(self) -> None:
        accounts, self._resumed_accounts = self._resumed_accounts, None
        if accounts is not None:
            self._tr_loss.fill_(accounts["loss_since_log"])
            self._globalstep_last_logged = int(accounts["last_logged_step"])
            self._total_loss_scalar = accounts["loss_until_log"]
            self._gradient_bytes.sent = accounts.get("gradient_bytes_sent", 0.0)
            processes = self.hybrid_optimizer.processes
            if processes is not None:
                processes.bytes_sent = accounts.get("base_bytes_sent", 0)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # The run was resumed after its last step, and Trainer would take one more.
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_peft(self.model) and not is_sharded(self):
            load_adapter(self.model, Path(resume_from_checkpoint))
        elif is_sharded(self) or not copy_weights(
            Path(resume_from_checkpoint), self.model if model is None else model
        ):
            with naming_damage(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if has_shards(self) and not is_sharded(self):
            # All processes gather the state, and the first one writes it.
            state = self.optimizer.state_dict()
            vars(self.optimizer)["state_dict"] = lambda: state
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            vars(self.optimizer).pop("state_dict", None)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming_damage(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.state.compute_steps(self.args, self.state.max_steps)
            self._name_best(self._output_folder)
            accounts = Path(checkpoint) / ACCOUNTS_FILE
            if accounts.exists():
                self._resumed_accounts = read_json_object(accounts, has_nan=True)
        if checkpoint is not None and self._history is not None:
            self._history.go_to(Path(checkpoint))
        if checkpoint is not None:
            self._load_buffers(Path(checkpoint))
        with naming_damage(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = self._hybrid
        if optimizer is not None and len(optimizer.trajectory):
            # With save_only_model there is no optimizer state. The trajectory knows the step.
            last = optimizer.trajectory.updates[-1][0].step
            optimizer.step_count = max(optimizer.step_count, last + 1)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if is_peft(self.model) and not is_sharded(self):
            load_adapter(self.model, best)
        elif is_sharded(self) or not copy_weights(best, self.model):
            super()._load_best_model()
        if self._history is not None:
            self._history.go_to(best)
        self._load_buffers(best)
