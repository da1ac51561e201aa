"""The order of the samples: random reshuffling, and the two orders that theory compares it with.

    reshuffle          a new permutation in every epoch, each sample exactly once (the paper's)
    shuffle-once       one permutation for all epochs
    with-replacement   n independent draws per epoch

The order of an epoch is a pure function of (seed, epoch). It does not depend on the global
generator, the number of workers, or anything that ran before. The sampler's state is the pair
(epoch, position).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal, get_args

import numpy as np
from torch.utils.data import BatchSampler, Sampler

from zofo.errors import UserError

Sampling = Literal["reshuffle", "shuffle-once", "with-replacement"]
SAMPLINGS: Final[tuple[str, ...]] = get_args(Sampling)


def epoch_order(num_samples: int, *, seed: int, epoch: int, sampling: Sampling) -> np.ndarray:
    """Sample indices of one epoch: int64, shape [num_samples].

    The indices come from numpy's Philox generator with key (seed, epoch).
    """
    key = (seed, 0 if sampling == "shuffle-once" else epoch)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    if sampling == "with-replacement":
        return generator.integers(num_samples, size=num_samples)
    return generator.permutation(num_samples)


class Turns:
    """The samples of numbered batches under reshuffling, as a pure function of seed and number.

    Args:
        num_samples: size of the data set.
        batch_size: samples of a batch; the last one of an epoch goes on with the next epoch.
        seed: seed of the order.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._order: tuple[int, np.ndarray] = -1, np.empty(0)

    def __call__(self, number: int) -> list[int]:
        """The samples of a batch, by its number in the run, from 0."""
        start = number * self.batch_size
        return [self._at(place) for place in range(start, start + self.batch_size)]

    def first(self, num_batches: int) -> list[int]:
        """The samples of the first batches, each once, in ascending order."""
        if num_batches * self.batch_size >= self.num_samples:
            return list(range(self.num_samples))
        return sorted({sample for number in range(num_batches) for sample in self(number)})

    def _at(self, place: int) -> int:
        epoch, place = divmod(place, self.num_samples)
        if self._order[0] != epoch:
            order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch, sampling="reshuffle")
            self._order = epoch, order
        return int(self._order[1][place])


class ReshufflingSampler(Sampler[int]):
    """Yields one epoch's order at each iteration, then moves to the next epoch.

    Args:
        num_samples: size of the data set.
        seed: seed of the order.
        sampling: "reshuffle", "shuffle-once" or "with-replacement".

    Raises:
        UserError: for an unknown sampling or an empty data set.
    """

    def __init__(
        self, num_samples: int, *, seed: int = 0, sampling: Sampling = "reshuffle"
    ) -> None:
        if sampling not in SAMPLINGS:
            raise UserError(f"sampling is {sampling!r}; choose one of {', '.join(SAMPLINGS)}")
        if num_samples < 1:
            raise UserError(f"the training set has {num_samples} samples; it needs at least one")
        self.num_samples, self.seed, self.sampling = num_samples, seed, sampling
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        epoch, num = self.epoch, self.num_samples
        order = epoch_order(num, seed=self.seed, epoch=epoch, sampling=self.sampling)
        for position, index in enumerate(order[self.position :], self.position + 1):
            # The state addresses the next sample, which may be the first of the next epoch.
            self.epoch, self.position = (epoch, position) if position < num else (epoch + 1, 0)
            yield int(index)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the first sample of `epoch`, unless it is under way."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The identity of the order and the position in it."""
        keys = ("seed", "sampling", "num_samples", "epoch", "position")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            UserError: if the state belongs to another order.
        """
        for key in ("seed", "sampling", "num_samples"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"the sampler's state has {key} {state[key]!r}, this run has "
                    f"{getattr(self, key)!r}; resume with the data and options of the saved run"
                )
        self.epoch, self.position = state["epoch"], state["position"]


class RankBatches(BatchSampler):
    """One process's part of each batch that several processes share, with every sample once.

    The processes cut each batch of size · batch_size samples into consecutive parts, rank after
    rank. Where the samples do not suffice, the parts of the last batch are as equal as possible. If
    they do not suffice for one sample on each process, they join the batch before.

    Args:
        sampler: the order of all samples, equal on every process.
        batch_size: samples of one process in a whole batch.
        rank: this process's number.
        size: number of processes.
        drop_last: whether to leave out the samples after the last whole batch.

    Raises:
        UserError: if there are fewer samples than processes.
    """

    def __init__(
        self, sampler: Any, batch_size: int, rank: int, size: int, *, drop_last: bool = False
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.rank, self.size = rank, size
        if len(sampler) < size:
            raise UserError(
                f"the training set has {len(sampler)} samples, and each of {size} processes needs "
                "one in every batch; start fewer processes"
            )

    def _sizes(self) -> list[int]:
        """The number of samples of each batch, over all processes."""
        whole = self.batch_size * self.size
        num_whole, rest = divmod(len(self.sampler), whole)  # type: ignore[arg-type]
        sizes = [whole] * num_whole
        if rest and not self.drop_last:
            if rest < self.size and sizes:
                sizes[-1] += rest
            else:
                sizes.append(rest)
        return sizes

    def __len__(self) -> int:
        return len(self._sizes())

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        for num in self._sizes():
            batch = [next(order) for _ in range(num)]
            share, more = divmod(num, self.size)
            start = self.rank * share + min(self.rank, more)
            yield batch[start : start + share + (self.rank < more)]
        # The sampler moves to the next epoch with its last sample.
        for _ in order:
            pass
