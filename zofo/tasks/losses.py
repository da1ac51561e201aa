"""Scores of tokens and candidates, and the training loss of a batch.

`zofo.tasks.encode` gives the equations of the scores and of the loss.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zofo.errors import UserError
from zofo.tasks.spec import Objective


@dataclass(frozen=True)
class TokenScores:
    """Log-likelihood (at least float32) of each target token, and whether it is the likeliest."""

    log_likelihood: Tensor
    is_first_choice: Tensor | None


def token_scores(
    model: nn.Module, batch: dict[str, Tensor], *, with_first_choice: bool = False
) -> TokenScores:
    """Score every target token of a batch with targets; tensors of shape [tokens]."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    place = batch["place"]
    if "output_ids" in batch:
        # Teacher forcing: the decoder reads the outputs shifted by one token.
        outputs, start = batch["output_ids"], _decoder_start(model)
        begin = outputs.new_full((len(outputs), 1), start)
        inputs["decoder_input_ids"] = torch.cat((begin, outputs[:, :-1]), dim=1)
    # Computing only the logits that are scored saves most of the [rows, tokens, vocabulary] memory.
    if _keeps_logits(model):
        wanted, slot = place[:, 1].unique(return_inverse=True)
        logits = model(**inputs, logits_to_keep=wanted + virtual_tokens(model)).logits
    else:
        logits = model(**inputs).logits
        slot = place[:, 1] + virtual_tokens(model)
    scored = logits[place[:, 0], slot]  # [places, vocabulary]
    scored = scored.to(torch.promote_types(scored.dtype, torch.float32))
    # Log-softmax at the target tokens only, without a second tensor of this shape.
    chosen = scored[batch["token_place"], batch["token_id"]]
    first = scored.argmax(dim=-1)[batch["token_place"]] if with_first_choice else None
    return TokenScores(
        chosen - torch.logsumexp(scored, dim=-1)[batch["token_place"]],
        None if first is None else first == batch["token_id"],
    )


def candidate_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores, float32 [examples, most candidates of an example]; −inf pads missing candidates."""
    if "place" not in batch:
        return functional.log_softmax(_encoder_logits(model, batch), dim=-1)
    scores = _mean_by(token_scores(model, batch).log_likelihood, batch["token_candidate"])
    example, index = batch["candidate"].unbind(1)  # [candidates] each
    table = scores.new_full((len(batch["gold"]), int(index.max()) + 1), -torch.inf)
    return table.index_put((example, index), scores)


def objective_loss(
    model: nn.Module, batch: dict[str, Tensor], objective: Objective = "candidates"
) -> Tensor:
    """The training loss of a batch: float32 scalar; see `objective_losses`."""
    return objective_losses(model, batch, objective)[0]


def objective_losses(
    model: nn.Module, batch: dict[str, Tensor], objective: Objective = "candidates"
) -> tuple[Tensor, Tensor]:
    """The training loss of a batch, and each example's share of it; see `losses_and_errors`."""
    return losses_and_errors(model, batch, objective)[:2]


def losses_and_errors(
    model: nn.Module, batch: dict[str, Tensor], objective: Objective = "candidates"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The training loss of a batch, each example's share of it, and the prediction errors.

    Args:
        model: the model.
        batch: from `Collator` or `first_examples`.
        objective: "candidates" or "gold"; completions, with one candidate, always use "gold".

    Returns:
        The loss, a float32 scalar. The shares, detached [examples], whose mean is the loss up to
        rounding; the mean of a random subset is an unbiased estimate of it. For completions the
        loss is a mean over tokens, and a share is an example's summed loss divided by the mean
        number of tokens of an example. The errors, float64 [examples]: 1 if another candidate has
        the highest score, else 0; None for completions.
    """
    gold = batch["gold"]
    if "place" not in batch:
        logits = _encoder_logits(model, batch)
        return *_cross_entropies(logits, gold), _errors(logits, gold)
    if len(batch["candidate"]) == len(gold):
        losses = -token_scores(model, batch).log_likelihood
        sums = losses.new_zeros(len(gold)).index_add(0, batch["token_candidate"], losses.detach())
        tokens = batch.get("tokens_per_example", len(losses) / len(gold))
        return losses.mean(), sums / tokens, None
    scores = candidate_scores(model, batch)
    errors = _errors(scores, gold)
    if objective == "candidates":
        return *_cross_entropies(scores, gold), errors
    losses = -scores.gather(1, gold[:, None])
    return losses.mean(), losses.detach()[:, 0], errors


def first_examples(batch: dict[str, Tensor], num: int) -> tuple[dict[str, Tensor], float]:
    """The first examples of a batch with unchanged padding, and their share of the rows."""
    gold = batch["gold"]
    if "place" not in batch:
        return {name: tensor[:num] for name, tensor in batch.items()}, num / len(gold)
    num_candidates = int((batch["candidate"][:, 0] < num).sum())
    num_tokens = int((batch["token_candidate"] < num_candidates).sum())
    # Places and rows are numbered in the order of the examples, so a prefix of each suffices.
    num_places = int(batch["token_place"][:num_tokens].max()) + 1
    num_rows = int(batch["place"][:num_places, 0].max()) + 1
    ends = {"gold": num, "place": num_places, "candidate": num_candidates}
    ends |= dict.fromkeys(("input_ids", "attention_mask", "output_ids"), num_rows)
    ends |= dict.fromkeys(("token_place", "token_id", "token_candidate"), num_tokens)
    part = {name: batch[name][:end] for name, end in ends.items() if name in batch}
    # Shares are relative to the mean number of tokens in the whole batch.
    part["tokens_per_example"] = torch.tensor(len(batch["token_id"]) / len(gold))
    return part, num_rows / len(batch["input_ids"])


def _cross_entropies(scores: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    loss = functional.cross_entropy(scores, gold)
    return loss, functional.cross_entropy(scores.detach(), gold, reduction="none")


def _errors(scores: Tensor, gold: Tensor) -> Tensor:
    return (scores.detach().argmax(dim=1) != gold).double()


def _encoder_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    names = ("input_ids", "attention_mask", "token_type_ids")
    output = model(**{name: batch[name] for name in names if name in batch})
    logits: Tensor = output.logits
    return logits.float()


def _mean_by(values: Tensor, group: Tensor) -> Tensor:
    num_groups = int(group.max()) + 1
    counts = torch.bincount(group, minlength=num_groups).to(values.dtype)  # [groups]
    return values.new_zeros(num_groups).index_add(0, group, values) / counts


def virtual_tokens(model: Any) -> int:
    """Virtual tokens before the input's logits; prefix tuning adds none, it fills the cache."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    if config is None or not getattr(config, "is_prompt_learning", False):
        return 0
    if getattr(model.config, "is_encoder_decoder", False):  # they are part of the encoder's input
        return 0
    if str(getattr(config.peft_type, "value", config.peft_type)) in ("PREFIX_TUNING", "CARTRIDGE"):
        return 0
    return int(config.num_virtual_tokens)


def _decoder_start(model: Any) -> int:
    """The first input token of a decoder."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        if getattr(model.config, name, None) is not None:
            return int(getattr(model.config, name))
    raise UserError(
        f"the configuration of {model.__class__.__name__} has no decoder_start_token_id; set it"
    )


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
