"""A trained model as a plain Hugging Face folder, for tools that know nothing of zofo.

    DIR/            base at its trained values, adapter merged into it (LoRA and its kin)
    DIR/adapter/    the adapter, where it cannot be merged (prefix, prompt): peft's files

A LoRA is merged in float32, then rounded once to the dtype asked for. What was written is loaded
again with plain transformers and peft, and compared with the trained model before the folder gets
its name: a folder that exists is a folder that was checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo.console import quiet
from zofo.disk.folders import writing_folder
from zofo.errors import UserError
from zofo.models.adapters import attach_adapter, is_peft
from zofo.models.loading import DTYPES, model_class
from zofo.optim.blocks import split_parameters
from zofo.saved.export_card import Exported, describe, usage
from zofo.saved.export_check import (
    Deviation,
    Samples,
    check_tokenizers,
    check_weights,
    deviation,
    digests_of,
    logits_of,
    sample_inputs,
    tolerance_of,
)
from zofo.saved.manifest import ADAPTER_FOLDER, CARD_FILE
from zofo.saved.source import Source, drop_weights, open_source, plain_base


@dataclass(frozen=True)
class Content:
    """What goes into a folder, and what it must do there.

    Attributes:
        model: the plain model; cast in place, and without weights once it is written.
        adapter: the `PeftModel` whose adapter goes beside it (its base may lack weights); None:
            merged, or there is none.
        source: where it is from.
        tokenizer: as it was in training.
        samples: inputs to compare on.
        expected: logits on them.
        step: of the base, if that is written instead of the trained model.
    """

    model: Any
    adapter: Any
    source: Source
    tokenizer: Any
    samples: Samples
    expected: list[Tensor]
    step: int | None = None


def export_model(
    folder: str | Path,
    to: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Exported:
    """Write a trained model as a plain Hugging Face folder, checked against the trained model.

    Args:
        folder: a run, an artefact, or a checkpoint in a run folder.
        to: where to; must not exist, or be empty.
        dtype: "float32", "bfloat16" or "float16"; None: that of the base.
        max_shard_size: largest safetensors file, such as "5GB" or "500MB".
        trust_remote_code: run code that the base's repository brings, if the base needs that.

    Raises:
        UserError: if the folder holds no trained model, `to` is in use or cannot be written, or
            what was written is not the trained model within the dtype's tolerance
            (`zofo.saved.export_check`). Nothing is left behind then.
    """
    to = check_target(to, dtype, max_shard_size)
    source = open_source(folder, trust_remote_code=trust_remote_code)
    trained, tokenizer = source.load()
    samples = sample_inputs(source, trained, tokenizer)
    expected = logits_of(trained, samples)
    model: Any = _merge(trained, samples, expected)
    adapter: Any = None
    if model is None:
        drop_weights(trained)  # merging may have changed them
        adapter, tokenizer = source.load_start()
        drop_weights(adapter, split_parameters(adapter).base.values())
        model = plain_base(source)
    content = Content(model, adapter, source, tokenizer, samples, expected)
    return write_folder(content, to, dtype=dtype, max_shard_size=max_shard_size)


def check_target(to: str | Path, dtype: str | None, max_shard_size: str) -> Path:
    """Refuse what cannot be written, before anything is loaded.

    Raises:
        UserError: for a folder in use, or an unknown dtype or size.
    """
    path = Path(to).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another folder or remove it")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"[1-9]\d*[KMG]i?B", max_shard_size):
        raise UserError(f"max_shard_size is {max_shard_size!r}; give a size such as 5GB or 500MB")
    return path


def write_folder(
    content: Content, to: Path, *, dtype: str | None = None, max_shard_size: str = "5GB"
) -> Exported:
    """Write a folder, load it with plain libraries, compare, and give it its name.

    Args:
        content: what to write.
        to: the folder.
        dtype: of the weights; None: the base's.
        max_shard_size: of a safetensors file.

    Raises:
        UserError: as `export_model`.
    """
    source, samples = content.source, content.samples
    chosen = dtype or source.base.dtype
    tolerance = tolerance_of(chosen, source.base.dtype)
    tokenizer = source.plain_tokenizer()
    remedy = "Nothing was written there: free space or choose another folder"
    with writing_folder(to, remedy=remedy, is_checkpoint=False) as temporary, quiet():
        _save(content, tokenizer, temporary, to, DTYPES[chosen], max_shard_size)
        found = _compare(content, temporary)
        if not found.within(tolerance):
            raise UserError(
                f"the folder would not be the trained model: its logits differ by "
                f"{found.largest:.3g}, {found.share:.3%} of the largest logit, on "
                f"{samples.origin}; {tolerance:.3%} is allowed in {chosen}. Nothing was exported; "
                "try dtype float32"
            )
        exported = Exported(
            to,
            content.adapter is None,
            chosen,
            found.largest,
            tolerance * found.scale,
            samples.origin,
            usage(to, source.base.head, is_merged=content.adapter is None),
        )
        describe(exported, source, content.step, temporary)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return exported


def _merge(trained: Any, samples: Samples, expected: list[Tensor]) -> nn.Module | None:
    """The model with its adapter in the base's weights, in float32; None where peft cannot."""
    if not is_peft(trained):
        return trained
    if not hasattr(trained.base_model, "merge_and_unload"):
        return None
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in trained.parameters()):
        trained.float()
        expected = logits_of(trained, samples)
    try:
        with quiet():
            merged: nn.Module = trained.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError):
        return None
    # An adapter on a tied embedding, for one, would leak into the output layer.
    is_same = deviation(logits_of(merged, samples), expected).within(tolerance_of("float32"))
    return merged if is_same else None


def _save(
    content: Content,
    tokenizer: Any,
    folder: Path,
    to: Path,
    dtype: torch.dtype,
    max_shard_size: str,
) -> None:
    """Model, tokenizer and adapter."""
    model, source, adapter = content.model, content.source, content.adapter
    config = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = True  # training and scoring have no use for it, generating does
    if source.base.head == "classification" and source.labels:
        config.id2label = dict(enumerate(source.labels))
        config.label2id = {label: i for i, label in enumerate(source.labels)}
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = content.tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    if adapter is not None:
        for config in adapter.peft_config.values():
            config.base_model_name_or_path = str(to.resolve())
        adapter.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
        (folder / ADAPTER_FOLDER / CARD_FILE).unlink(missing_ok=True)


def load_plain(
    folder: Path, head: str, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Model (without adapter) and tokenizer of an export, as plain transformers loads them.

    Args:
        folder: the export.
        head: the model's.
        trust_remote_code: run code that lies in the folder.
    """
    import transformers as hf

    with quiet():
        model = model_class(head).from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


def _compare(content: Content, folder: Path) -> Deviation:
    """What plain transformers and peft make of the folder, against the trained model."""
    base, written = content.source.base, digests_of(content.model)
    drop_weights(content.model)  # what is read from the folder takes their place
    model, tokenizer = load_plain(folder, base.head, trust_remote_code=base.trust_remote_code)
    check_weights(model, written)
    if content.adapter is not None:
        model = attach_adapter(model, folder / ADAPTER_FOLDER)
    check_tokenizers(tokenizer, content.tokenizer, content.samples)
    return deviation(logits_of(model.eval(), content.samples), content.expected)


def replay_base(
    path: str | Path,
    to: str | Path,
    step: int,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the base as it was after some updates, as a plain Hugging Face folder.

    The adapter's history is not recorded, so there is none in the folder.

    Args:
        path: a run, artefact or checkpoint whose method moves the base by zeroth order.
        to: where to; must not exist, or be empty.
        step: number of updates, from 0 (the original base) to all that are recorded.
        dtype: of the weights; None: the base's.
        max_shard_size: largest safetensors file.
        trust_remote_code: run code that the base's repository brings, if the base needs that.
        progress: called with the numbers of weights done and to be done.

    Raises:
        UserError: for a step that is not recorded, and as `zofo.export_model`.
    """
    to = check_target(to, dtype, max_shard_size)
    source = open_source(path, trust_remote_code=trust_remote_code)
    history = source.history()
    if not 0 <= step <= len(history):
        raise UserError(
            f"step is {step}; {path} has {len(history)} recorded updates of the base, so give a "
            f"number from 0 to {len(history)}"
        )
    start, tokenizer = source.load_start()
    drop_weights(start)  # base and adapter fit; the base alone is what is written
    model = plain_base(source, stop=step, progress=progress)
    samples = sample_inputs(source, model, tokenizer)
    content = Content(model, None, source, tokenizer, samples, logits_of(model, samples), step=step)
    return write_folder(content, to, dtype=dtype, max_shard_size=max_shard_size)
