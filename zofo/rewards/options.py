"""How answers are written and compared: type, default, range and help text of each option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from zofo.errors import UserError, problem_in_words
from zofo.rewards.score import TIME_LIMIT_S

T = TypeVar("T")


@dataclass(kw_only=True)
class RewardOptions:
    """The answers of a step, and how their rewards are compared."""

    num_answers: Annotated[
        int, Field(ge=1, description="answers to each prompt, each under a direction of its own")
    ] = 8
    batch_size: Annotated[int, Field(ge=1, description="prompts per micro-batch")] = 8
    max_new_tokens: Annotated[int, Field(ge=1, description="most tokens of an answer")] = 64
    # Greedy, as in "Evolution Strategies at Scale" (arXiv 2509.24372): answers differ by direction.
    temperature: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="of the draws; 0: most likely token")
    ] = 0.0
    scale: Annotated[
        Literal["group", "batch", "none"],
        Field(description="divide by the spread of a prompt's rewards, of all, or not"),
    ] = "group"
    time_limit_s: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="seconds of one call of a reward")
    ] = TIME_LIMIT_S
    memory_gib: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="memory for the answers written together"),
    ] = 2.0  # Choice.


def checked(options: T) -> T:
    """A copy of options that a dataclass holds, converted to their types.

    Raises:
        UserError: for values outside their ranges; it lists all of them.
    """
    try:
        return TypeAdapter(type(options)).validate_python(vars(options))
    except ValidationError as error:
        problems = [problem_in_words(str(e["loc"][0]), e) for e in error.errors()]
        raise UserError("; ".join(problems)) from None
