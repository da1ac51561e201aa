"""What server and parties tell each other about the base, as plain records.

    server → party    protocol, options, digests, the rows of the log that the party lacks, and the
                      number of its first local step
    party → server    the scalars of its local steps, and its position in the log

A round never waits for a party. One that is dead, late, behind or wrong is left out, its numbers of
steps stay unused, and the base moves by the others'. Because the log alone moves the base, a party
that missed rounds needs only the rows since its position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from zofo.errors import UserError
from zofo.federated.base_log import PROTOCOL, BaseLog, Behind, Record
from zofo.federated.party import Contribution, Party
from zofo.noise.philox import MAX_STEP
from zofo.optim.trajectory import MAX_UPDATES

REFUSAL: Final = "refusal"
"""The entry of a party's record that says why it cannot take part."""


@dataclass(frozen=True)
class Task:
    """What the server asks of a party, checked.

    Attributes:
        log: the log, up to date.
        first_step: number of the first local step; 0 if the party does not train.
    """

    log: BaseLog
    first_step: int


class Coordinator:
    """The server's side: it deals out numbers of steps, and joins the scalars of a round.

    Args:
        log: the log of the run.
    """

    def __init__(self, log: BaseLog) -> None:
        self.log = log
        self._positions: dict[int, int] = {}  # of each party, in the log
        self._first_steps: dict[int, int] = {}  # of each party, in this round
        self._next_step = log.next_step

    def tasks(self, parties: Collection[int], *, trains: bool) -> dict[int, Record]:
        """The record for each party.

        Args:
            parties: their numbers.
            trains: whether they take local steps.

        Raises:
            UserError: if the log is full.
        """
        log, num_steps = self.log, self.log.options.num_steps
        after = self._next_step + len(parties) * num_steps
        num_rows = len(log) + len(parties) * num_steps
        if after >= MAX_STEP or num_rows * len(log.trajectory.groups) > MAX_UPDATES:
            raise UserError(
                f"the log of the base has {len(log)} rows and no room for another round; begin a "
                "new run on the trained base (zofo export)"
            )
        known = {
            "protocol": PROTOCOL,
            "options": log.options.to_json(),
            "base": log.base_fingerprint,
            "origin": log.digest(0),
        }
        records = {}
        if trains:
            self._first_steps = {}
        for i, party in enumerate(sorted(parties)):
            records[party] = {**known, **log.since(self._positions.get(party, 0))}
            if trains:
                self._first_steps[party] = self._next_step + i * num_steps
                records[party]["own_first_step"] = self._first_steps[party]
        if trains:  # A number that nobody used stays unused, so that no round repeats another.
            self._next_step = after
        return records

    def join(self, replies: Mapping[int, tuple[Mapping[str, Any], float]]) -> dict[int, str]:
        """Add the scalars of a round to the log, in the order of the parties' numbers.

        Args:
            replies: party -> its record, and its number of examples.

        Returns:
            Party -> why it is left out of this round.
        """
        left_out: dict[int, str] = {}
        accepted: dict[int, tuple[list[tuple[float, ...]], float]] = {}
        kinds = sorted(self.log.trajectory.rank_one) if len(self.log) else None
        for party in sorted(replies):
            record, num_examples = replies[party]
            rows = rows_of(record)
            problem = self.problem_of(party, record)
            problem = problem or self._problem_of_rows(party, record, rows, num_examples, kinds)
            if problem is not None:
                left_out[party] = problem
                continue
            if rows and kinds is None:
                kinds = list(record.get("rank_one", ()))
            accepted[party] = rows, num_examples
        total = math.fsum(num for _, num in accepted.values())
        for party, (rows, num) in accepted.items():
            self.log.add(self._first_steps[party], rows, num / total, kinds or ())
        return left_out

    def problem_of(self, party: int, record: Mapping[str, Any]) -> str | None:
        """Note a party's position; return why its reply is of no use, or None."""
        if REFUSAL in record:
            return str(record[REFUSAL])
        position = record.get("position")
        if type(position) is not int or not 0 <= position <= len(self.log):
            return f"it has {position!r} rows of the log"
        self._positions[party] = position
        if record.get("is_behind"):
            return "it lacks rows of the log, which it gets in the next round"
        return None

    def _problem_of_rows(
        self,
        party: int,
        record: Mapping[str, Any],
        rows: list[tuple[float, ...]],
        num_examples: float,
        kinds: list[int] | None,
    ) -> str | None:
        """Why the scalars of a party cannot join the log, or None."""
        options = self.log.options
        if not 0 < num_examples < math.inf:
            return f"it has {num_examples} examples"
        if len(rows) != (options.num_steps if options.base_rates else 0):
            return f"it has scalars of {len(rows)} local steps instead of {options.num_steps}"
        if not all(math.isfinite(s) for row in rows for s in row):
            return "its scalars are not finite"
        if rows and record.get("own_first_step") != self._first_steps.get(party, -1):
            return "its scalars are those of another round"
        if rows and len(self.log) == 0 and kinds not in (None, list(record.get("rank_one", ()))):
            return "its weights have other kinds of direction than the first party's"
        return None


def answer(
    work: Callable[[Task], Record],
    party: Party,
    state: Mapping[str, Any] | None,
    task: Mapping[str, Any],
) -> tuple[Record, Record | None]:
    """Do what the server asks, or say why not.

    Args:
        work: trains or evaluates, and returns the record for the server.
        party: the party.
        state: the party's own copy of the log; None: it has none.
        task: the server's record.

    Returns:
        The record for the server, and the party's new copy of the log; None: keep the old one.
    """
    try:
        read = read_task(party, state, task)
        return work(read), read.log.since(0)
    except Behind as behind:
        return {"position": behind.position, "is_behind": True}, None
    except UserError as error:
        return {REFUSAL: str(error)}, None


def read_task(party: Party, state: Mapping[str, Any] | None, task: Mapping[str, Any]) -> Task:
    """Read the server's record on a party.

    Args:
        party: the party, whose model has to be the server's.
        state: the party's own copy of the log, as `BaseLog.since(0)` gave it; None: it has none.
        task: the server's record.

    Raises:
        Behind: if the server sent too few rows.
        UserError: if versions, options or bases differ.
    """
    own = party.log
    if task.get("base") != own.base_fingerprint:
        raise UserError(
            f"the server's base has the fingerprint {task.get('base')}, and this party's "
            f"{own.base_fingerprint}; load the same model in the same dtype everywhere"
        )
    if task.get("origin") != own.digest(0):
        raise UserError(
            "this party and the server name or draw the directions of the base differently; "
            "install the same version of zofo and make the same adapter everywhere"
        )
    log = own.copy()
    if state is not None:
        log.follow(state)
    log.follow(task)
    return Task(log, int(task.get("own_first_step", 0)))


def check_protocol(task: Mapping[str, Any]) -> None:
    """Check that this version of zofo can read the server's record.

    Raises:
        UserError: if it cannot.
    """
    if task.get("protocol") != PROTOCOL:
        raise UserError(
            f"the server speaks version {task.get('protocol')!r} of the federated protocol, and "
            f"this zofo version {PROTOCOL}; install the same version of zofo everywhere"
        )


def record_of(contribution: Contribution, log: BaseLog) -> Record:
    """A party's answer: its scalars, and its position in the log."""
    record: Record = {"position": len(log), "own_first_step": contribution.first_step}
    if contribution.rows:
        record["num_directions"] = len(contribution.rows[0])
        record["scalars"] = [s for row in contribution.rows for s in row]
        if not len(log) and contribution.rank_one:
            record["rank_one"] = list(contribution.rank_one)
    return record


def rows_of(record: Mapping[str, Any]) -> list[tuple[float, ...]]:
    """The scalars of a party's answer, [steps, directions]."""
    scalars, num = record.get("scalars", []), record.get("num_directions", 1)
    if type(num) is not int or num < 1 or len(scalars) % num:
        return []
    if not all(type(s) is float for s in scalars):
        return []
    return [tuple(scalars[i : i + num]) for i in range(0, len(scalars), num)]
