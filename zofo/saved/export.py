"""Write a trained model as a plain Hugging Face folder, which tools read without zofo.

    DIR/            the trained base, with the adapter merged into it (such as LoRA)
    DIR/adapter/    files of peft, for an adapter that cannot be merged (prefix, prompt), or whose
                    base is quantised

The adapter is merged in float32, and the result is rounded once to the requested dtype. Changed
weights lie in temporary files beside the target, so memory holds one of them at a time. zofo writes
to a temporary folder, loads it with plain transformers and peft, compares it with the trained model
and then renames it. Every folder that exists has therefore passed the comparison.

A quantised base is written with its codes, its moved scales and its adapter beside it: a folder of
bitsandbytes that gives the same logits bit for bit. A merge would round the adapter into the codes
and change the model, so it happens only on request, and the change is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.console import quiet
from zofo.disk.files import problem_of_target
from zofo.disk.folders import writing_folder
from zofo.disk.mapped import move_to_disk
from zofo.errors import UserError
from zofo.models.loading import DTYPES, explaining, model_class, read_model_config
from zofo.models.quantized import QUANTIZATIONS, device_map, stored_quantization
from zofo.models.saved_adapters import attach_adapter
from zofo.optim.blocks import is_peft, keep_unpacked, split_parameters
from zofo.perturb.quantized import has_codes
from zofo.saved.artifact import save_adapter
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
from zofo.saved.manifest import ADAPTER_FOLDER
from zofo.saved.source import Source, drop_weights, open_source, plain_base

_MERGED_INTO_CODES: Final = 1.0
"""Tolerance of a merge into codes, whose change is reported: it only excludes a broken model."""


@dataclass(frozen=True)
class Content:
    """The content of an exported folder, and the logits that it must give."""

    model: Any  # without adapter; writing casts it in place and then frees its weights
    adapter: Any  # `PeftModel` (perhaps without base weights) of an adapter that is not merged
    source: Source  # the trained model on disk
    tokenizer: Any  # as training used it
    samples: Samples  # inputs for the comparison
    expected: list[Tensor]  # logits on each input, as `logits_of` gives them
    step: int | None = None  # step of the base, if the base alone is written
    is_changed: bool = False  # whether the merge has rounded the adapter into codes


def export_model(
    folder: str | Path,
    to: str | Path,
    *,
    dtype: str | None = None,
    merge: bool | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Exported:
    """Write a trained model as a plain Hugging Face folder, checked against the trained model.

    Args:
        folder: a run, an artefact, or a checkpoint in a run folder.
        to: the target folder; it must be empty or not exist.
        dtype: "float32", "bfloat16" or "float16"; None for the dtype of the base, which a
            quantised base keeps.
        merge: whether to merge the adapter into the base, if peft can; None: unless the base is
            quantised, where a merge changes the model.
        max_shard_size: size limit of a safetensors file, such as "5GB" or "500MB".
        trust_remote_code: whether to run code from the base's repository, if the base needs it.

    Raises:
        UserError: if the folder holds no trained model, `to` is in use or cannot be written, or
            the logits differ by more than the tolerance of the dtype
            (`zofo.saved.export_check`). The export then leaves no files.
    """
    to = check_target(to, dtype, max_shard_size)
    source, disk = open_source(folder, trust_remote_code=trust_remote_code), _disk_of(to)
    trained, tokenizer = source.load(disk=disk)
    is_quantized = has_codes(trained)
    if is_quantized and dtype not in (None, source.base.dtype):
        raise UserError(
            f"dtype is {dtype}, and the base is quantised, so that its codes and scales have "
            "dtypes of their own; leave dtype out"
        )
    samples = sample_inputs(source, trained, tokenizer)
    expected = logits_of(trained, samples)
    is_wanted = merge or (merge is None and not is_quantized) or not is_peft(trained)
    model: Any = _merge(trained, samples, expected, disk) if is_wanted else None
    adapter: Any = None
    if model is None and merge:
        raise UserError(
            "peft cannot merge this adapter without an error; leave the merge out, and the adapter "
            "lies beside the base"
        )
    if model is None:
        # A failed merge may have changed the weights, so the parts are loaded again.
        drop_weights(trained)
        adapter, tokenizer = source.load_start()
        drop_weights(adapter, split_parameters(adapter).base.values())
        model = plain_base(source, disk=disk)
    is_changed = is_quantized and bool(merge) and source.adapter is not None
    parts = model, adapter, source, tokenizer, samples, expected
    content = Content(*parts, is_changed=is_changed)
    return write_folder(content, to, dtype=dtype, max_shard_size=max_shard_size)


def check_target(to: str | Path, dtype: str | None, max_shard_size: str) -> Path:
    """Check the arguments before anything is loaded, and return the target folder.

    Raises:
        UserError: if the folder is in use, or the dtype or the size is invalid.
    """
    path = Path(to).expanduser()
    problem = problem_of_target(path, is_folder=True)
    if problem is not None:
        raise UserError(problem)
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} exists and is not empty; choose another folder or remove it")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"[1-9]\d*[KMG]i?B", max_shard_size):
        raise UserError(f"max_shard_size is {max_shard_size!r}; give a size such as 5GB or 500MB")
    return path


def write_folder(
    content: Content, to: Path, *, dtype: str | None = None, max_shard_size: str = "5GB"
) -> Exported:
    """Write a folder, check it with plain transformers and peft, and rename it.

    The arguments and errors are those of `export_model`.
    """
    source, samples = content.source, content.samples
    chosen = dtype or source.base.dtype
    tolerance = tolerance_of(chosen, source.base.dtype)
    if has_codes(content.model):
        tolerance = _MERGED_INTO_CODES if content.is_changed else 0.0
    tokenizer = source.plain_tokenizer()
    remedy = "Nothing was written there: free space or choose another folder"
    with writing_folder(to, remedy=remedy, is_checkpoint=False) as temporary, quiet():
        _save(content, tokenizer, temporary, to, DTYPES[chosen], max_shard_size)
        found = _compare(content, temporary)
        if not found.within(tolerance):
            raise UserError(
                "the exported model differs from the trained model: its logits differ by "
                f"{found.largest:.3g} ({found.share:.3%} of the largest logit) on "
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
            content.is_changed,
        )
        describe(exported, source, content.step, temporary)
    return exported


def _disk_of(to: Path) -> Path:
    """The folder for temporary files: the nearest one above the target that exists."""
    return next(folder for folder in to.absolute().parents if folder.is_dir())


def _merge(trained: Any, samples: Samples, expected: list[Tensor], disk: Path) -> nn.Module | None:
    """The model with the adapter merged in float32; None if peft cannot merge it correctly."""
    if not is_peft(trained):
        return trained
    if not hasattr(trained.base_model, "merge_and_unload"):
        return None
    is_quantized = has_codes(trained)
    # Merging in 16 bits would round twice: the sum of the weights, and then the exported weight.
    is_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in trained.parameters())
    if is_half and not is_quantized:
        move_to_disk(trained.parameters(), disk, torch.float32)
        trained.float()  # its buffers
        expected = logits_of(trained, samples)
    try:
        with quiet():
            _merge_layers(trained, disk)
            merged: nn.Module = trained.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError):
        return None
    if is_quantized:  # The change is measured when the folder is compared.
        return merged
    # Merging can be wrong: an adapter on a tied embedding would also change the output layer.
    is_same = deviation(logits_of(merged, samples), expected).within(tolerance_of("float32"))
    return merged if is_same else None


def _merge_layers(trained: Any, disk: Path) -> None:
    """Merge the layers one by one, so that memory holds one changed layer; peft skips these."""
    layers = [module for module in trained.modules() if hasattr(module, "get_base_layer")]
    if any(hasattr(layer, "unload_and_optionally_merge_module") for layer in layers):
        return  # Such a layer contains others, which it merges itself.
    for layer in layers:
        layer.merge()
        move_to_disk(layer.get_base_layer().parameters(), disk)


def _save(
    content: Content, tokenizer: Any, folder: Path, to: Path, dtype: torch.dtype, shard_size: str
) -> None:
    model, source, adapter = content.model, content.source, content.adapter
    config = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = True  # Training turns the cache off, but generation needs it.
    if source.base.head == "classification" and source.labels:
        config.id2label = dict(enumerate(source.labels))
        config.label2id = {label: i for i, label in enumerate(source.labels)}
    if not has_codes(model):
        move_to_disk((p for p in model.parameters() if p.dtype != dtype), _disk_of(to), dtype)
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = content.tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    if adapter is not None:  # peft finds the base under the final name of the folder.
        save_adapter(adapter, folder / ADAPTER_FOLDER, base_name=str(to.resolve()))


def load_plain(
    folder: Path, head: str, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Load the model (without adapter) and the tokenizer of an export with plain transformers."""
    import transformers as hf

    with explaining(str(folder), str(folder)), quiet():
        config = read_model_config(folder, str(folder), trust_remote_code=trust_remote_code)
        # The trained model has its logits from the CPU, and bitsandbytes would prefer a GPU.
        is_quantized = stored_quantization(config) in QUANTIZATIONS
        kwargs = {"device_map": device_map("cpu")} if is_quantized else {}
        model = model_class(head).from_pretrained(
            folder, trust_remote_code=trust_remote_code, **kwargs
        )
        keep_unpacked(model)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


def _compare(content: Content, folder: Path) -> Deviation:
    """Load the folder with plain transformers and peft, and compare it with the trained model."""
    base, written = content.source.base, digests_of(content.model)
    drop_weights(content.model)  # Only one model is in memory at a time.
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
    """Write the base as it was after `step` updates, as a plain Hugging Face folder.

    The folder holds no adapter, because zofo records no history of the adapter.

    Args:
        path: a run, artefact or checkpoint whose method trains the base by zeroth order.
        to: the target folder; it must be empty or not exist.
        step: number of updates, from 0 (the original base) to the number that is recorded.
        dtype: dtype of the weights; None for the dtype of the base.
        max_shard_size: size limit of a safetensors file.
        trust_remote_code: whether to run code from the base's repository, if the base needs it.
        progress: called with the number of weights done and the total number.

    Raises:
        UserError: if the step is not recorded, and as `zofo.export_model`.
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
    drop_weights(start)  # Loading has checked that base and adapter fit.
    model = plain_base(source, stop=step, progress=progress, disk=_disk_of(to))
    samples = sample_inputs(source, model, tokenizer)
    content = Content(model, None, source, tokenizer, samples, logits_of(model, samples), step=step)
    return write_folder(content, to, dtype=dtype, max_shard_size=max_shard_size)
