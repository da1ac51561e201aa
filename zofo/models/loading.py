"""Load models and tokenizers by hub id, local folder or alias.

An alias names a model inside a Python package (`zofo.models.embedded`).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from zofo.console import quiet
from zofo.disk.files import StoredTensors, open_tensors
from zofo.errors import UserError
from zofo.models.embedded import ALIASES, embedded_folder
from zofo.models.fitting import explained, load_fitting, mark_new, modules_of_head, new_weights
from zofo.models.limits import check_model_config
from zofo.models.model_folders import check_digests, check_model_folder
from zofo.models.quantized import (
    QUANTIZATIONS,
    bitsandbytes_config,
    check_new_weights,
    check_quantization,
    device_map,
    explaining_method,
    keep_savable,
    quantize_empty,
)
from zofo.models.trust import check_kernels
from zofo.optim.blocks import keep_unpacked

Head = Literal["causal-lm", "classification", "seq2seq"]
ADAPTER_CONFIG: Final = "adapter_config.json"
HEADS: Final[tuple[str, ...]] = get_args(Head)
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def resolve(name: str) -> str:
    """The folder of an alias, or else the given folder or hub id.

    Raises:
        UserError: if an alias lacks its package, a folder holds no model or a file that cannot be
            read safely, or a name is unknown.
    """
    if name in ALIASES:
        return str(embedded_folder(name, ALIASES[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).exists():
            raise UserError(
                f"the folder {name} holds an adapter of peft, which is no model; give the model "
                "that it was trained on, or merge both (peft's merge_and_unload) and save the sum"
            )
        if not (path / "config.json").exists():
            raise UserError(f"the folder {name} holds no config.json, so no model; choose another")
        check_model_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        place = "" if path.is_absolute() else f" in {Path.cwd()}, where a relative path begins"
        raise UserError(
            f"the model folder {name} does not exist{place}; correct the path, or start zofo where "
            "it leads to the model"
        )
    if "/" not in name:
        near = difflib.get_close_matches(name, ALIASES, n=1)
        if near:
            raise UserError(f"there is no model {name!r}; did you mean {near[0]!r}?")
    return name


def load_model(
    name: str,
    *,
    head: Head = "causal-lm",
    dtype: str = "float32",
    num_labels: int = 2,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    quantization: str | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, Any]:
    """Load a pretrained model and its tokenizer.

    Args:
        name: alias, folder or hub id.
        head: "causal-lm", "seq2seq" for encoder-decoders, or "classification" for a new head on an
            encoder.
        dtype: "float32", "bfloat16", "float16" or "float64".
        num_labels: number of classes of the classification head.
        revision: branch, tag or commit of the hub id.
        trust_remote_code: whether to run code from the model's repository.
        attn_implementation: as in transformers; None for its choice.
        seed: seed of the initial weights of a new head. Global generators keep their state.
        tokenizer: tokenizer of the model; None for the one in the model's folder.
        quantization: "nf4", "fp4" or "int8", by bitsandbytes; None for the weights as they are.
        device: where bitsandbytes puts the model, "cpu" or "cuda"; any other model is loaded on the
            CPU.

    Raises:
        UserError: if the model cannot be found, has no such head, its weights do not fit it, or it
            is quantised otherwise or without the package that reads it.
    """
    import transformers as hf

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    source = resolve(name)
    if Path(source).is_dir():
        check_digests(Path(source))
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    kwargs: dict[str, Any] = {**shared, "dtype": DTYPES[dtype]}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    with explaining(name, source), torch.random.fork_rng():
        with quiet():
            if tokenizer is None:
                tokenizer = hf.AutoTokenizer.from_pretrained(source, **shared)
            config = read_model_config(
                source, name, **shared, attn_implementation=attn_implementation
            )
            stored = check_quantization(quantization, config, name)
            if (stored or quantization) in QUANTIZATIONS:
                kwargs["device_map"] = device_map(device)
            if quantization is not None and stored is None:
                rest = modules_of_head(head, config, trust_remote_code=trust_remote_code)
                kwargs["quantization_config"] = bitsandbytes_config(
                    quantization, DTYPES[dtype], device, rest
                )
            if head == "classification":
                kwargs["num_labels"] = num_labels
                if stored in QUANTIZATIONS:  # transformers would fail at a new head in codes.
                    _ = empty_model(name, head=head, num_labels=num_labels, **shared)
            else:
                _require_head(head, config, name)
        is_classifier = head == "classification"
        with explaining_method(stored, name):
            model = load_fitting(
                model_class(head),
                source,
                name=name,
                is_classifier=is_classifier,
                seed=seed,
                **kwargs,
            )
    if stored in QUANTIZATIONS:
        keep_savable(model)
    keep_unpacked(model)
    prepare(model, tokenizer)
    return model, tokenizer


def read_model_config(
    source: str | Path,
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """Read and check the configuration of a model before anything is built from it.

    Args:
        source: folder or hub id, as `resolve` gives it.
        name: the model as the user named it.
        revision: branch, tag or commit of the hub id.
        trust_remote_code: whether to run code from the model's repository, or kernels from another.
        attn_implementation: as in transformers; None for the one that the configuration names.

    Raises:
        UserError: if its sizes cannot be built, or it asks for kernels that are not allowed.
    """
    import transformers as hf

    if not trust_remote_code and attn_implementation is None:
        values, _ = hf.PreTrainedConfig.get_config_dict(source, revision=revision)
        check_kernels(values, name)
    config = hf.AutoConfig.from_pretrained(
        source, revision=revision, trust_remote_code=trust_remote_code
    )
    check_model_config(config, name)
    return config


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a tokenizer without its model.

    Raises:
        UserError: as `load_model`.
    """
    import transformers as hf

    source = resolve(name)
    with explaining(name, source), quiet():
        tokenizer = hf.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    _prepare_tokenizer(tokenizer)
    return tokenizer


def empty_model(
    name: str,
    *,
    head: Head = "causal-lm",
    dtype: str = "float32",
    num_labels: int = 2,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> nn.Module:
    """Build a model on torch's meta device, with shapes but without weights.

    Raises:
        UserError: as `load_model`.
    """
    source = resolve(name)
    with explaining(name, source), quiet(), torch.device("meta"):
        # Nothing is computed, so the simplest attention will do, whatever config.json names.
        shared: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            "attn_implementation": "eager",
        }
        config = read_model_config(source, name, revision=revision, **shared)
        stored = check_quantization(quantization, config, name)
        kwargs = {**shared, "dtype": DTYPES[dtype]}
        if head == "classification":
            config.num_labels = num_labels
        else:
            _require_head(head, config, name)
        model: nn.Module = model_class(head).from_config(config, **kwargs)
        if stored in QUANTIZATIONS:
            quantize_empty(model, config.quantization_config)
        elif quantization is not None:
            rest = modules_of_head(head, config, trust_remote_code=trust_remote_code)
            quantize_empty(model, bitsandbytes_config(quantization, DTYPES[dtype], "cpu", rest))
    if head == "classification":
        mark_new(model, open_tensors(*weight_files(source, revision))[0].keys())
        check_new_weights(model, new_weights(model), name)
    return model


def stored_weights(
    name: str, model: nn.Module, weights: Mapping[str, nn.Parameter], *, revision: str | None = None
) -> StoredTensors | None:
    """The weights of a loaded model, to be read from its files one at a time.

    A file may list a weight under the name of a tied one, or without the names of the modules that
    contain it. Every weight is compared with the tensor that was found for it, so a wrong guess
    does no harm.

    Args:
        name: alias, folder or hub id that the model was loaded from.
        model: the model, on the CPU, with or without an adapter.
        weights: name -> parameter, with the values that were loaded.
        revision: branch, tag or commit of the hub id.

    Returns:
        Name -> tensor in the parameter's dtype; None if there are no safetensors files, or if they
        do not hold every weight bit for bit.
    """
    stored, _ = open_tensors(*weight_files(resolve(name), revision))
    names: dict[int, list[str]] = {}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(alias)
    keys: dict[str, str] = {}
    for own, parameter in weights.items():
        for alias in (own, *names.get(id(parameter), ())):
            parts = alias.split(".")
            for i in range(len(parts)):  # Drop the outer modules one by one.
                if ".".join(parts[i:]) in stored:
                    keys.setdefault(own, ".".join(parts[i:]))
    if keys.keys() != weights.keys():
        return None
    found = stored.under(keys, {own: parameter.dtype for own, parameter in weights.items()})
    return found if all(torch.equal(found[own], p) for own, p in weights.items()) else None


def copy_weights(folder: Path, model: nn.Module) -> bool:
    """Copy the weights of `model.safetensors` into a model, one tensor at a time.

    The model may be on any device and keeps its dtypes.

    Returns:
        Whether the file holds exactly the tensors of the model, each under its name or that of a
        tied one. If not, nothing was copied.

    Raises:
        UserError: if a tensor has another shape in the file, or the file is damaged.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        return False
    stored, _ = open_tensors(path)
    live = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    if not stored.keys() <= live.keys():
        return False
    # Tied tensors share an address, and the file holds only one of their names.
    if {t.data_ptr() for t in live.values()} != {live[name].data_ptr() for name in stored}:
        return False
    for name, tensor in stored.items():
        if tensor.shape != live[name].shape:
            raise UserError(f"{path} has {name!r} in another shape; load it into its own model")
        live[name].copy_(tensor)
    return True


def weight_files(source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder, or of a hub id in the cache."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source, "config.json", revision=revision)
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def model_class(head: str) -> Any:
    """The class of transformers that loads a model with this head."""
    import transformers as hf

    if head == "classification":
        return hf.AutoModelForSequenceClassification
    return hf.AutoModelForSeq2SeqLM if head == "seq2seq" else hf.AutoModelForCausalLM


def head_of(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Head:
    """The head for a model: encoders classify, decoders and encoder-decoders generate.

    Raises:
        UserError: as `load_model`.
    """
    source = resolve(name)
    with explaining(name, source), quiet():
        config = read_model_config(
            source,
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager",  # No model is built here, so none is looked for.
        )
    if _is_encoder_decoder(config):
        return "seq2seq"
    return "classification" if _is_encoder(config) else "causal-lm"


def prepare(model: Any, tokenizer: Any) -> None:
    """Prepare training and scoring: padding on the right, a pad token, no cache."""
    _prepare_tokenizer(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False


def _prepare_tokenizer(tokenizer: Any) -> None:
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has neither a pad nor an end token; set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token


def _is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.model_type not in CAUSAL:
        return "AutoModelForCausalLM" not in _own_code(config)
    # BERT and similar models are in both tables; they decode only if their configuration says so.
    return config.model_type in MASKED and not getattr(config, "is_decoder", False)


def _is_encoder_decoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as KNOWN,
    )

    is_known = config.model_type in KNOWN or "AutoModelForSeq2SeqLM" in _own_code(config)
    return bool(getattr(config, "is_encoder_decoder", False)) and is_known


def _own_code(config: Any) -> Mapping[str, Any]:
    """The classes that a model with code of its own brings: class of transformers -> its own."""
    return getattr(config, "auto_map", None) or {}


def _require_head(head: Head, config: Any, name: str) -> None:
    """Refuse a head for generation that the model does not have."""
    is_pair = _is_encoder_decoder(config)
    if head == "seq2seq" and not is_pair:
        suited = "classification" if _is_encoder(config) else "causal-lm"
        raise UserError(
            f"the model {name} is of type {config.model_type}, which is no encoder-decoder; use it "
            f"with head {suited}"
        )
    if head == "causal-lm" and is_pair:
        raise UserError(
            f"the model {name} is of type {config.model_type}, an encoder-decoder; use it with "
            "head seq2seq"
        )
    if head == "causal-lm" and _is_encoder(config):
        raise UserError(
            f"the model {name} is of type {config.model_type}, an encoder that does not generate; "
            "use it with head classification, or choose a decoder"
        )


@contextlib.contextmanager
def explaining(name: str, source: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        remedy = explained(error, source, name, ALIASES)
        raise UserError(f"the model {name!r} cannot be loaded ({first}); {remedy}") from error


HEAD_NAMES: Final = {
    "causal-lm": ("AutoModelForCausalLM", "text-generation"),
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "text2text-generation"),
}
"""Head -> (class of transformers, name of the task on the hub)."""
