"""The schema of a run's configuration: its keys, their types, defaults and descriptions.

The documentation shows the descriptions. The default learning rates depend on method and adapter,
so `zofo.config.load` fills them in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_serializer

from zofo.disk.yaml import yaml_text
from zofo.models.adapter_kinds import AdapterType
from zofo.models.layers import ALL, Layers, checked_layers
from zofo.models.quantized import Quantization
from zofo.optim.batch_part import num_rows_of
from zofo.optim.methods import METHODS, MethodName
from zofo.optim.options import STEP_KEYS, Radius, StepOptions
from zofo.rewards.options import RewardOptions
from zofo.sections import MAX_COUNT, MAX_THREADS, Section
from zofo.tasks.preference import PreferenceOptions
from zofo.tasks.spec import TaskSpec

AUTO: Final = "auto"
AUTO_KEYS: Final = ("base_lr", "adapter_lr", "eps")  # `zofo.run.auto` can measure them.


def _is_auto(value: Any) -> str:
    """The tag of the union's member, so that pydantic reports errors of that member only."""
    return AUTO if value == AUTO else "number"


_Auto = Annotated[Literal["auto"], Tag(AUTO)]
Rate = Annotated[Annotated[float, Field(ge=0), Tag("number")] | _Auto, Discriminator(_is_auto)]
RadiusOrAuto = Annotated[Annotated[Radius, Tag("number")] | _Auto, Discriminator(_is_auto)]
BaseRate = Annotated[
    Annotated[float | dict[str, float], Tag("number")] | _Auto, Discriminator(_is_auto)
]

# The usual rate of full fine-tuning with AdamW, where the search for the rate of fo-ft begins.
FIRST_ORDER_BASE_LR: Final = 1e-5


class ModelConfig(Section):
    """The base."""

    name: str = Field("smollm2-135m", description="hub id, folder, or smollm2-135m, minilm")
    head: Literal["auto", "causal-lm", "classification", "seq2seq"] = Field(
        "auto",
        description="seq2seq: encoder-decoders; classification: a fresh head on an encoder",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the base; peft keeps adapters in float32"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub id")
    trust_remote_code: bool = Field(
        False, description="run code from the model's repository; a file can ask, but not allow it"
    )
    attn_implementation: str | None = Field(None, description="as in transformers")
    quantization: Annotated[
        Quantization | None, BeforeValidator(lambda value: None if value == "none" else value)
    ] = Field(None, description="nf4, fp4 or int8: hold the linear layers in 4 or 8 bits")

    def tokenizer(self) -> Any:
        """Its tokenizer, without the model."""
        from zofo.models.loading import load_tokenizer

        return load_tokenizer(
            self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
        )


class AdapterConfig(Section):
    """The PEFT module."""

    type: AdapterType = Field("lora", description="kind of adapter; none for fo-ft and zo-ft")
    r: int = Field(8, ge=1, description="rank of lora, dora and rslora (paper)")
    alpha: float = Field(16.0, gt=0, description="scale alpha / r (paper); rslora: alpha / √r")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the input of lora, dora and rslora"
    )
    targets: str | list[str] | None = Field(
        None,
        description="modules that lora, dora, rslora, ia3 adapt: names, all-linear, peft's choice",
    )
    layers: Annotated[Layers, BeforeValidator(checked_layers)] = Field(
        ALL, description="layers in which they do so: all, last 4, first 4, or a list of numbers"
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="the most parameters that they have: only the most important of the modules "
        "hold the adapter, measured before the run",
    )
    budget_batches: int = Field(
        16, ge=1, le=MAX_COUNT, description="batches of training rows that measure the importance"
    )
    modules: list[str] | None = Field(
        None, min_length=1, description="modules chosen for budget; zofo writes them into run.yaml"
    )
    num_virtual_tokens: int | None = Field(
        None, ge=1, description="length of prefix (default 5), prompt and p-tuning (default 10)"
    )
    init_text: str | None = Field(None, description="initial text of prompt or prefix")
    config_file: str | None = Field(None, description="any peft configuration, JSON or YAML")

    @property
    def label(self) -> str:
        """Its name in results and folders: the type, or the name of the configuration file."""
        return self.type if self.config_file is None else Path(self.config_file).stem

    @property
    def has_open_budget(self) -> bool:
        """Whether the modules for the budget are still to be chosen, so that `build` is wide."""
        return self.budget is not None and self.modules is None

    def build(self, model: Any, head: str, tokenizer: Any, *, seed: int = 0) -> Any:
        """The model with this adapter on it, as `zofo.create_adapter` makes it."""
        from zofo.models.adapters import create_adapter

        values = self.model_dump(exclude={"budget", "budget_batches", "modules"})
        if self.modules is not None:
            values |= {"targets": self.modules, "layers": ALL}
        return create_adapter(model, head=head, tokenizer=tokenizer, seed=seed, **values)  # type: ignore[arg-type]


class RewardConfig(Section, RewardOptions):
    """Rewards of answers: followed with zo_objective reward, else only measured before and after.

    The fields of `RewardOptions` are among the keys.
    """

    functions: str | list[str] | dict[str, float] | None = Field(
        None,
        description="rewards, or a map from them to weights: json, regex:PATTERN, length:LOW-HIGH, "
        "words:A,B, reasoning-gym, package.module:function, file.py:function; code runs only if "
        "the call names it",
    )
    data: str | None = Field(
        None, description="prompts: a file or a hub dataset id; default: the task's training rows"
    )
    prompt: str = Field("prompt", description="column of the prompt, a text or messages, in data")
    num_held_out: int = Field(
        32, ge=0, description="prompts to answer before and after training, and not in between"
    )


class PreferenceConfig(Section, PreferenceOptions):
    """The pairs of zo_objective preference; `PreferenceOptions` are among its keys."""

    data: str | None = Field(
        None, description="pairs: a file or a hub dataset id; default: the task's training rows"
    )
    prompt: str = Field(
        "prompt",
        description="column of the prompt; without it, both answers begin with the prompt",
    )
    chosen: str = Field("chosen", description="column of the preferred answer, a text or messages")
    rejected: str = Field("rejected", description="column of the other answer")
    num_held_out: int = Field(
        64, ge=0, description="pairs to compare before and after training, and at evaluations"
    )


class RunConfig(Section, StepOptions):
    """One run; the fields of `StepOptions` are among its keys."""

    method: MethodName = Field("hybrid", description="how the base and the adapter are trained")
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    task: TaskSpec = TaskSpec()
    reward: RewardConfig = RewardConfig()
    preference: PreferenceConfig = PreferenceConfig()
    watch_task: TaskSpec | None = Field(
        None,
        description="a second task, by its name or with the keys of task; its score on dev rows is "
        "logged before training and at each evaluation, and decides nothing",
    )

    base_lr: BaseRate | None = Field(
        None,
        description="learning rate of the base, a map from name patterns to rates, or auto",
    )
    adapter_lr: Rate | None = Field(None, description="learning rate of the adapter, or auto")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="optimizer of the first-order block (paper: sgd)"
    )
    scheduler: str = Field(
        "constant", description="learning-rate schedule of transformers (paper: constant)"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    base_weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of the base")
    base_anchor: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="pull of a zeroth-order base to its original weights: each update goes the "
        "share base_lr · base_anchor of the way back",
    )
    adapter_weight_decay: float = Field(
        0.0, ge=0, description="weight decay of the adapter's optimizer"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the first-order gradient to this norm; null: no clipping"
    )

    eps: RadiusOrAuto = Field(  # type: ignore[assignment]
        StepOptions.eps,
        description="smoothing radius (as in MeZO), or auto; 0.1 for zo-peft of a prefix (paper)",
    )
    base_batch_fraction: float = Field(
        1.0, gt=0, le=1, description="share of each batch on which the loss difference is measured"
    )
    zo_objective: Literal["loss", "accuracy", "f1", "reward", "preference"] = Field(
        "loss",
        description="what the zeroth-order block follows: training loss, accuracy, F1, reward, or "
        "the margin of preference pairs",
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop", description="if a loss is not finite: stop with a checkpoint, or skip the step"
    )

    steps: int | None = Field(None, ge=1, description="number of optimizer steps; default 200")
    epochs: float | None = Field(
        None, gt=0, le=MAX_COUNT, description="number of epochs, in place of steps"
    )
    batch_size: int = Field(8, ge=1, description="rows per micro-batch")
    accumulation: int = Field(1, ge=1, description="micro-batches per step")
    eval_batch_size: int = Field(32, ge=1, description="rows per forward pass of an evaluation")
    sampling: Literal["reshuffle", "shuffle-once", "with-replacement"] = Field(
        "reshuffle", description="order of the rows (paper: reshuffle)"
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations on dev; default: a quarter of the run"
    )
    select_best: bool = Field(True, description="return to the checkpoint with the best dev score")
    select_by: Literal["loss", "accuracy", "f1"] = Field(
        "loss", description="dev score that selects the checkpoint; loss has less noise"
    )
    early_stopping: float | None = Field(
        None,
        ge=0,
        description="in the second half, stop if the dev loss exceeds its start by this (nats)",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="end the run after so many evaluations on dev without a better score",
    )
    measure_test: bool = Field(True, description="score the test rows before and after training")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    snapshot_every: int | None = Field(
        None,
        ge=1,
        description="steps between full copies of the base, so that resuming replays less",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the first-order pass to save memory"
    )

    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random numbers")
    device: str = Field("auto", description="device to compute on: auto, cpu, cuda or mps")
    num_threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads; default: torch's choice"
    )
    output_dir: str | None = Field(
        None, description="run folder; default: runs/TASK-METHOD-ADAPTER with a number"
    )
    report_to: list[str] = Field(
        [], description="integrations of Trainer to report to, such as tensorboard"
    )

    @property
    def auto_keys(self) -> tuple[str, ...]:
        """The keys that are auto and that the method uses, so the run begins by measuring them."""
        method = METHODS[self.method]
        orders = {"base_lr": method.base, "adapter_lr": method.adapter}
        orders["eps"] = "zeroth" if method.zeroth else "frozen"
        return tuple(k for k in AUTO_KEYS if getattr(self, k) == AUTO and orders[k] != "frozen")

    @model_serializer(mode="wrap")
    def _method_first(self, serialize: Any) -> dict[str, Any]:
        """Put the keys of `StepOptions` last, so that a configuration begins with `method`."""
        return dict(sorted(serialize(self).items(), key=lambda item: item[0] in STEP_KEYS))

    def to_yaml(self) -> str:
        """The configuration as YAML, which reads back to an equal configuration."""
        return yaml_text(self.model_dump())


def has_own_rows(config: RunConfig) -> bool:
    """Whether the zeroth-order block has rows of its own instead of the examples."""
    return config.zo_objective in ("reward", "preference")


def share_of(config: RunConfig) -> float:
    """The share of a full micro-batch on which the loss difference is measured."""
    return num_rows_of(config.base_batch_fraction, config.batch_size) / config.batch_size
