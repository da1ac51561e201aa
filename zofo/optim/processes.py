"""What the processes of one step exchange, so that their weights keep the same bits.

    adapter     its gradients, by DistributedDataParallel or by the caller
    base        once a step, 8 bytes for each direction, and 8 for loss and checksum

Each process evaluates its own rows. The loss of the step is the mean of the processes' losses. The
scalars are gathered and summed in the order of the ranks, so that every process computes the same
numbers and applies the same update. No floating-point reduction of the network is involved, whose
order of summation may differ between processes.

If rows have directions of their own, a row is numbered in the batch of all processes: micro-batch
after micro-batch, and rank after rank within each. The same rows in the same order therefore have
the same directions on any number of processes.

Each step also compares a checksum of one part of one weight, and the next step one of the next
part. A difference ends the run, and the message names the weight. Of weights that FSDP2 shards, no
other process holds the same rows, so only their shapes and dtypes are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.perturb.shards import begin_anew, is_sharded

PART: Final = 1 << 20
"""Elements of the part of a weight that a step compares. A choice: it takes about a millisecond."""
_AS_INTEGER: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of an element -> the words that its bits are read as."""


class Processes:
    """The processes of a group.

    Args:
        group: a `torch.distributed` process group.
        model: the model of this process; the others have equal ones.

    Attributes:
        rank: this process's number within the group.
        size: number of processes.
        has_even_rows: whether each process has as many rows in the current micro-batch as this one.
            The caller sets it, alike on every process.
        bytes_sent: bytes that this process has sent to the other ones, without the comparison of
            settings and weights at the start.
    """

    def __init__(self, group: Any, model: nn.Module) -> None:
        self.group, self._model = group, model
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.has_even_rows = False
        self.bytes_sent = 0
        self._is_compared = False
        blocks = split_parameters(model)
        weights = {**blocks.base, **blocks.adapter}
        self._weights = {name: w for name, w in weights.items() if not is_sharded(w)}
        self._shards = {name: w for name, w in weights.items() if is_sharded(w)}
        for name, weight in self._shards.items():
            mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
            if mesh.size() != self.size:
                raise UserError(
                    f"{name} is sharded over a mesh of {mesh.size()} processes, and process_group "
                    f"has {self.size}; pass the group of all processes of the mesh"
                )
        self._parts = [
            (name, start)
            for name, weight in self._weights.items()
            for start in range(0, max(weight.numel(), 1), PART)
        ]
        # gloo communicates from the memory of the host, and nccl from that of the device, where
        # sharded weights need not lie.
        is_gloo = dist.get_backend(group) == "gloo"
        found = next(iter(weights.values())).device
        if not is_gloo and found.type == "cpu":
            found = torch.accelerator.current_accelerator() or found
        self._device = torch.device("cpu") if is_gloo else found

    @classmethod
    def of(cls, group: Any, model: nn.Module) -> Processes | None:
        """The processes of a group; None without one.

        Raises:
            UserError: if the model is sharded and there is no group.
        """
        if group is not None:
            return cls(group, model)
        if any(map(is_sharded, model.parameters())):
            raise UserError(
                "the weights are sharded over processes, and process_group is None; pass the group "
                "of all processes that hold a shard, such as torch.distributed.group.WORLD"
            )
        return None

    def settle(self) -> None:
        """Let the modules hold shards, also after a pass that failed."""
        if self._shards:
            begin_anew(self._model)

    def wait(self) -> None:
        """Wait until all processes are here, as before one reads what another has written."""
        dist.barrier(self.group)

    def counts(self, num_rows: int, are_even: bool = False) -> list[int]:
        """The number of rows of this micro-batch on each process, by rank."""
        if are_even:
            return [num_rows] * self.size
        own = torch.tensor([num_rows], dtype=torch.int32, device=self._device)
        return [int(n) for n in self._gather(own)]

    def joined(
        self,
        loss: Tensor | None,
        scalars: Tensor | None,
        rows: Sequence[Sequence[int]],
        *,
        step: int,
        settings: Callable[[], dict[str, Any]],
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Join the numbers of one step.

        Args:
            loss: this process's unperturbed loss, float64, shape []; None: none was measured.
            scalars: its s_k, float64 [directions]; None: none were measured.
            rows: for each micro-batch, the number of rows on each process; empty if all processes
                have the same directions.
            step: the number of the step, which chooses the part that is compared.
            settings: returns name -> value for JSON, which the first call compares.

        Returns:
            The mean of the losses, each rounded to float32; the scalars of all directions; and
            whether a checksum differs (bool, []).

        Raises:
            UserError: in the first call, on every process, if settings or weights differ.
        """
        if not self._is_compared:
            before = self.bytes_sent
            self._compare(settings())
            self.bytes_sent = before
        self.settle()  # the update changes shards, and FSDP may still hold whole weights
        own = torch.zeros(0, dtype=torch.float64) if scalars is None else scalars
        lengths = [sum(counts[rank] for counts in rows) for rank in range(self.size)]
        longest = max(lengths) if rows else len(own)
        message = torch.zeros(1 + longest, dtype=torch.float64, device=self._device)
        # Loss and checksum share the first 8 bytes. No update depends on the digits of the loss.
        message[:1].view(torch.float32)[0] = 0.0 if loss is None else loss
        if self._parts:
            name, start = self._parts[step % len(self._parts)]
            message[:1].view(torch.int32)[1] = _lower_half(_checksum(self._weights[name], start))
        message[1 : 1 + len(own)] = own
        parts = self._gather(message)
        sums = torch.stack([part[:1].view(torch.int32)[1] for part in parts])
        differs = (sums != sums[0]).any().double()
        # Both sums are taken in the order of the ranks.
        losses: Any = sum(part[:1].view(torch.float32)[0].double() for part in parts)
        total: Any = sum(part[1:] for part in parts)
        mean = None if loss is None else (losses / self.size).to(loss)
        if scalars is None:
            return mean, None, differs
        if not rows:
            joined = total
        else:
            at = [1] * self.size
            pieces = []
            for counts in rows:
                for rank, count in enumerate(counts):
                    pieces.append(parts[rank][at[rank] : at[rank] + count])
                    at[rank] += count
            joined = torch.cat(pieces)
        return mean, (joined / self.size).to(scalars), differs

    def part_in_words(self, step: int) -> str:
        """The weight that a step compares."""
        return self._parts[step % len(self._parts)][0]

    def _compare(self, known: dict[str, Any]) -> None:
        """Check that all processes begin with the same settings and weights."""
        for name, weight in self._weights.items():
            sums = [_checksum(weight, at) for at in range(0, max(weight.numel(), 1), PART)]
            known[f"weight {name}"] = int(torch.stack(sums).sum())
        for name, weight in self._shards.items():
            known[f"shape of {name}"] = f"{weight.dtype} {list(weight.shape)}"
        text = torch.frombuffer(
            bytearray(json.dumps(known, default=str).encode()), dtype=torch.uint8
        )
        longest = max(self.counts(len(text)))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=self._device)
        padded[: len(text)] = text
        found = [json.loads(bytes(part.tolist())) for part in self._gather(padded)]
        for rank, other in enumerate(found):
            for key in {**found[0], **other}:
                here, there = found[0].get(key), other.get(key)
                if here != there:
                    values = "" if key.startswith("weight ") else f": {here!r} and {there!r}"
                    raise UserError(
                        f"process 0 and process {rank} begin with different values of {key}"
                        f"{values}; start every process with the same command, model and data"
                    )
        self._is_compared = True

    def _gather(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        self.bytes_sent += own.nbytes * (self.size - 1)
        return parts


@torch.no_grad()
def _checksum(weight: Tensor, start: int) -> Tensor:
    """A checksum of the bits of `PART` elements, which depends on their order: int64, shape [].

    If one word differs, so does the lower half of the checksum.
    """
    bits = weight.detach().reshape(-1)[start : start + PART]
    bits = bits.view(_AS_INTEGER[weight.element_size()]).to(torch.int64)
    # The sum wraps around at 2^64. Two words differ by less than 2^32, and an odd factor keeps a
    # difference that is no multiple of 2^32 from becoming one.
    factors = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return (bits * factors).sum()


def _lower_half(value: Tensor) -> Tensor:
    """The lower 32 bits of an int64 of shape []: int32, shape []."""
    return ((value + 2**31) % 2**32 - 2**31).to(torch.int32)
