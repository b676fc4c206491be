"""What a config may say: a class for each group of conf/, a field for each setting.

A field's annotation is its rule (``rules.py``). A new setting is a field here and a line in its file of conf/; what a
config of before it lacks has the default here. What several settings must satisfy together is in ``variants.py`` and
``checks.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from amod.entries import MERGE_BY, Entry, Halt, Predict, Prune
from amod.errors import UserError
from amod.plan import BY_THEMSELVES, PLACEMENTS, as_data, from_data, read_plan
from amod.training.rules import (
    Ascending,
    Batches,
    Compute,
    Count,
    Limit,
    NotNegative,
    OneOf,
    Part,
    Pixels,
    Positive,
    Probability,
    Rising,
    Seed,
    Share,
    Text,
    WholeNumber,
)
from amod.training.tasks import TASKS

CONF = Path(__file__).parents[3] / "conf"


def choices(group: str) -> tuple[str, ...]:
    """The files of a group, which are the names that its ``name`` may have."""
    return tuple(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


# --- the groups -----------------------------------------------------------------------------------------------------


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Open(Group):
    """Arguments that are handed to a library; the fields are those that are checked here."""

    model_config = ConfigDict(extra="allow")

    def arguments(self) -> dict[str, Any]:
        """Those that the config says."""
        return self.model_dump(exclude_unset=True)


class TimmArguments(Open):
    depth: Count | None = None
    embed_dim: Count | None = None
    num_heads: Count | None = None
    img_size: Pixels | None = None
    patch_size: Pixels | None = None


class Model(Group):
    name: Text
    task: Annotated[str, AfterValidator(OneOf(*TASKS))] = "classification"
    label: Text
    pretrained: bool = False
    checkpoint: Text | None = None
    drop_path: Probability = 0.0
    image_size: Annotated[list[Count], AfterValidator(Ascending())] | None = None  # of detection
    kwargs: TimmArguments = TimmArguments()


def model_file(name: str) -> Any:
    """The settings of conf/model/NAME.yaml."""
    file: Any = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    return file.get("model", file)


def check_classifier(model: Model, said: str) -> None:
    """UserError unless it is a model of images, for commands that serve no others."""
    if model.task != "classification":
        raise UserError(f"{said}: is a model of {model.task}; this command is for image classifiers")


UNROUTED = ("none", "isoflop")
WITHOUT_CAPACITY = (*UNROUTED, *BY_THEMSELVES, "plan")


class Router(Group):
    """Every router's settings; which of them a router has is what its file in conf/router says."""

    name: Annotated[str, AfterValidator(OneOf(*choices("router")))]
    keep_prefix: bool = False
    activation: Literal["none", "sigmoid"] = "none"
    memory: Annotated[float, Field(ge=0, le=0.99)] = 0.0  # of the scores by attention
    depth: Count | None = None  # of isoflop
    r: WholeNumber | None = None  # of tome and merge
    keep_rate: Share | None = None  # of evit and dynamicvit
    fuse: bool = True
    by: Annotated[str, AfterValidator(OneOf(*MERGE_BY))] = "keys"  # of tome and merge, and what follows
    rounds: Count = 1
    norm: bool = False
    proportional: Probability = 1.0
    skip: Literal["attention", "mlp", "block"] | None = None  # of tuning and what routes; what follows of tuning
    per: Literal["token", "sequence"] = "token"
    layers: list[WholeNumber] | None = None
    target: Probability | None = None
    scale: NotNegative | None = None
    cache: Literal["kept", "all"] = "kept"
    warmup: Annotated[list[NotNegative], AfterValidator(Rising())] | None = None  # of evit, in epochs
    ratio_weight: NotNegative = 2.0  # of dynamicvit, and the next three
    distil_tokens: NotNegative = 0.5
    backbone_lr: NotNegative = 0.01
    frozen: Annotated[float, Field(ge=0, le=0.99)] = 0.1667
    halt_scale: float = 10.0  # of avit, and the next three
    halt_shift: float = 75.0
    ponder: NotNegative = 5e-4
    distribution: NotNegative = 1e-3
    file: Text | None = None  # of plan
    plan: dict[str, Any] | None = None  # what that file said when the run began; a run folder has it, whole

    @model_validator(mode="after")
    def _read(self) -> Router:
        if self.name == "plan" and (self.file is not None or self.plan is not None):
            plan = from_data(self.plan) if self.plan is not None else read_plan(str(self.file))
            if not plan:
                raise UserError(
                    f"router.{'plan={}' if self.file is None else f'file={self.file}'}: names no block; the "
                    "dense model is router=none"
                )
            self.plan = {str(i): entry for i, entry in as_data(plan).items()}
        return self

    @field_validator("plan", mode="before")
    @classmethod
    def _numbered(cls, plan: Any) -> Any:
        """Blocks typed as numbers, as in ``router.plan={1:{Route:{capacity:0.5}}}``."""
        return {str(block): entry for block, entry in plan.items()} if isinstance(plan, dict) else plan

    def has(self, entry: type[Entry]) -> bool:
        """Whether such entries are in its plan, by the router's name or as the file says."""
        named = {"dynamicvit": Predict, "avit": Halt, "evit": Prune}.get(self.name)
        return named is entry or any(isinstance(one, entry) for one in from_data(self.plan or {}).values())


class Placement(Group):
    name: Annotated[str, AfterValidator(OneOf(*PLACEMENTS, "own"))]
    blocks: Any = None  # checked with the depth, by amod.plan
    last: Literal["class"] | None = None


class Data(Group):
    name: Annotated[str, AfterValidator(OneOf(*choices("data")))]
    root: Text = "data"
    fallback: list[str] = []
    download: bool = False
    train_on: Literal["train", "train+val"] = "train"
    num_classes: Annotated[int, Field(ge=2)] | None = None
    num_workers: WholeNumber | None = None
    length: Annotated[int, Field(ge=2)] = 128  # of text: tokens of a sample
    bos: bool = False  # of text: every sample begins with the tokenizer's beginning token
    test_fraction: Part = 0.2
    val_fraction: Part = 0.1
    split_seed: Seed = 0
    split_by: Literal["name", "order"] = "order"  # of runs of before the setting
    crop_pct: Share | None = None
    background: Literal["black", "noise"] = "black"
    on_error: Literal["stop", "skip"] = "stop"


class Augment(Open):
    scale: Annotated[list[float], AfterValidator(Ascending(1))] | None = None
    ratio: Annotated[list[float], AfterValidator(Ascending())] | None = None
    hflip: Probability | None = None
    re_prob: Probability | None = None
    sides: list[Count] | None = None  # of detection
    crop: bool | None = None


class Schedule(Group):
    train: Literal["all", "routers", "head"] = "all"
    lora: Count | None = None  # rank
    epochs: Count
    batch_size: Count
    eval_batch_size: Count
    accumulate: Count = 1
    optimizer: Text
    lr: Positive
    backbone_lr: Positive | None = None  # of detection
    lr_reference_batch: Count | None = None
    momentum: Probability = 0.9
    weight_decay: NotNegative
    warmup_epochs: NotNegative
    min_lr: NotNegative
    clip_grad: Positive | None = None
    label_smoothing: Probability = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    ema_decay: Probability | None = None
    augment: Augment = Augment()


class TrainerArguments(Group):
    """Lightning's arguments; what is Any here is checked there."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    strategy: Text = "auto"
    devices: Any = 1
    num_nodes: Count = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"] = "32-true"
    max_epochs: Count
    min_epochs: WholeNumber | None = None
    max_steps: Any = -1
    min_steps: WholeNumber | None = None
    max_time: Any = None
    limit_train_batches: Limit | None = None
    limit_val_batches: Batches | None = None
    limit_test_batches: Batches | None = None
    overfit_batches: Batches = 0.0
    val_check_interval: Limit | None = None
    check_val_every_n_epoch: Count | None = 1
    num_sanity_val_steps: Annotated[int, Field(ge=-1)] | None = 0
    log_every_n_steps: WholeNumber | None = 50
    accumulate_grad_batches: Count = 1
    gradient_clip_val: NotNegative | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = "norm"
    deterministic: Literal[True, False, "warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: Literal[False] = False  # the data module shares the images among the processes
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    enable_progress_bar: bool | None = None
    enable_model_summary: bool = False


class Logger(Group):
    name: Annotated[str, AfterValidator(OneOf(*choices("logger")))]
    project: Text = "amod"
    run_name: Text | None = None


class Callbacks(Group):
    name: Annotated[str, AfterValidator(OneOf(*choices("callbacks")))] = "none"
    monitor: Text = "val/top1"  # which, the task says
    patience: Count = 5
    min_delta: NotNegative = 0.0


class Variant(Group):
    """A model and how its tokens are routed."""

    capacity: Share
    budget: Annotated[float | str, AfterValidator(Compute())] | None = None
    distil: NotNegative = 0.0
    seed: Seed = 0
    model: Model
    router: Router
    placement: Placement
    data: Data


class TrainConfig(Variant):
    run_dir: Text = ""  # not in the folder's own config.yaml: the folder can be moved
    checkpoint_every_steps: Count | None = None
    schedule: Schedule
    trainer: TrainerArguments
    logger: Logger
    callbacks: Callbacks = Callbacks()


class UntrainedConfig(TrainConfig):
    images: Count | None = None


class EvaluationData(Group):
    """Null: as in the run."""

    root: Text | None = None
    num_workers: WholeNumber | None = None


class EvaluationTrainer(Group):
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] | None = None
    devices: Any = None
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"] | None = None


class EvaluateConfig(Group):
    run: Text | None = None
    split: Literal["test", "val", "all"] = "test"
    output: Text | None = None
    data: EvaluationData = EvaluationData()
    trainer: EvaluationTrainer = EvaluationTrainer()


class ExplainConfig(Variant):
    run: str | list[str] | None = None
    mod: str | list[str] | None = None
    dense: str | list[str] | None = None
    images: Text | None = None
    text: Text | None = None
    split: Literal["test", "val"] = "test"
    images_max: Count = 200
    tokens: Annotated[int, Field(ge=2)] | None = None
    shown: Count = 6
    output: Text | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    schedule: Schedule


class ExportConfig(Variant):
    run: Text | None = None
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    output: Text | None = None
    images: Text | None = None
    images_max: Annotated[int, Field(ge=4)] = 32
    int8: bool = False
    example: Text | None = None
    rounds: Count = 20
    schedule: Schedule


class SearchConfig(Group):
    """Of src/search.py; ``budget`` is a share of the dense cost below 1, else GFLOPs or milliseconds."""

    budget: Positive
    runtime: Literal["flops", "eager", "openvino", "onnx"] = "flops"
    run: Text | None = None
    images: Text | None = None
    texts: Text | None = None
    images_max: Annotated[int, Field(ge=8)] = 128
    effort: Positive = 60
    seed: Seed = 0
    output: Text | None = None
    save: Text | None = None
    model: Model
    data: Data
    schedule: Schedule


class Place(Group):
    root: Text | None = None


class FrontierConfig(Group):
    run: Text | None = None
    shares: list[Part] = [0.74, 0.5]
    images: Count = 3000
    split: Literal["test", "val"] = "test"
    search_images: Annotated[int, Field(ge=8)] = 128
    effort: Positive = 60
    seed: Seed = 0
    data: Place = Place()
    runtimes: list[Literal["eager", "openvino", "onnx"]] = []
    batches: list[Count] = [1, 8]
    timed: list[str] = []
    rounds: Count = 15
    clock: Literal["wall", "processor"] = "wall"
    output: Text
