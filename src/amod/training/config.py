"""What a config may say: a class for each group of conf/, a field for each setting.

A field's annotation is its rule, and the error line is read from it (``in_words``). A new setting is a field here and a
line in its file of conf/; what a config of before it lacks has the default here. What several settings must satisfy
together is in ``checks.py``.
"""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from amod.errors import UserError, did_you_mean, shown
from amod.plan import BY_THEMSELVES, PLACEMENTS, as_data, read_plan
from amod.training.tasks import TASKS

CONF = Path(__file__).parents[3] / "conf"
# Lightning's arguments that are not for the config: why.
OURS = dict.fromkeys(
    ("callbacks", "default_root_dir", "enable_checkpointing", "logger", "plugins"), "the run folder decides it"
)
OURS["fast_dev_run"] = "such a run would pass for a finished one; set trainer.limit_train_batches=1 schedule.epochs=1"


def choices(group: str) -> tuple[str, ...]:
    """The files of a group, which are the names that its ``name`` may have."""
    return tuple(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


# --- rules that no annotation of Python's says ----------------------------------------------------------------------


class Rule:
    """A check of a value that has the right type; ``words`` complete "must be ..."."""

    words: str

    def allows(self, value: Any) -> bool:
        raise NotImplementedError

    def __call__(self, value: Any) -> Any:
        if not self.allows(value):
            raise ValueError(self.words)
        return value


class OneOf(Rule):
    def __init__(self, *names: str) -> None:
        self.names = names
        self.words = ("one of " if len(names) > 1 else "") + ", ".join(names)

    def allows(self, value: Any) -> bool:
        return value in self.names


class Ascending(Rule):
    """Two numbers."""

    def __init__(self, high: float | None = None) -> None:
        self.high = high
        self.words = "two ascending numbers above 0" + (f", at most {high:g}" if high else "")

    def allows(self, value: Any) -> bool:
        return len(value) == 2 and 0 < value[0] <= value[1] <= (self.high or value[1])


class Rising(Rule):
    """When something begins and when it has ended."""

    words = "two rising numbers of at least 0"

    def allows(self, value: Any) -> bool:
        return len(value) == 2 and 0 <= value[0] < value[1]


class Sides(Rule):
    """One number of pixels, or [height,width]."""

    words = "a whole number of at least 1, or two of them, [height,width]"

    def allows(self, value: Any) -> bool:
        sides = value if isinstance(value, list) else [value, value]
        return len(sides) == 2 and min(sides) >= 1


class Compute(Rule):
    """GFLOPs, or a share of the dense model's."""

    words = "a number of GFLOPs above 0, or a share of the dense model's such as 75%"

    def allows(self, value: Any) -> bool:
        if isinstance(value, str):
            return bool(re.fullmatch(r"\d+(\.\d+)?%", value)) and 0 < float(value[:-1]) <= 100
        return value > 0


def one_of(*names: str) -> Any:
    """As an annotation, for values that are checked one by one."""
    return Annotated[str, AfterValidator(OneOf(*names))]


Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(gt=0, le=0.99)]  # of a split, whose rest must not be empty
Probability = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(pattern=r"\S")]
Pixels = Annotated[int | list[int], AfterValidator(Sides())]
# A number of batches (int) or a share of them (float): which of the two it is matters to Lightning.
Batches = Annotated[int | float, Field(ge=0)]
Limit = Annotated[int | float, Field(gt=0)]


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


UNROUTED = ("none", "isoflop")
WITHOUT_CAPACITY = (*UNROUTED, *BY_THEMSELVES, "plan")


class Router(Group):
    """Every router's settings; which of them a router has is what its file in conf/router says."""

    name: Annotated[str, AfterValidator(OneOf(*choices("router")))]
    keep_prefix: bool = False
    activation: Literal["none", "sigmoid"] = "none"
    memory: Annotated[float, Field(ge=0, le=0.99)] = 0.0  # of the scores by class attention
    depth: Count | None = None  # of isoflop
    r: WholeNumber | None = None  # of tome
    keep_rate: Share | None = None  # of evit and dynamicvit
    fuse: bool = True
    skip: Literal["attention", "mlp", "block"] | None = None  # of tuning, and what follows
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
        if self.name == "plan" and self.file is not None and self.plan is None:
            self.plan = {str(i): entry for i, entry in as_data(read_plan(self.file)).items()}
        return self


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
    train: Literal["all", "routers"] = "all"
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
    monitor: Literal["val/top1", "val/loss", "val/map"] = "val/top1"
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
    images_max: Count = 32
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
    images_max: Annotated[int, Field(ge=8)] = 128
    effort: Positive = 60
    seed: Seed = 0
    output: Text | None = None
    model: Model
    data: Data
    schedule: Schedule


class FrontierConfig(Group):
    run: Text | None = None
    shares: list[Part] = [0.74, 0.5]
    images: Count = 3000
    split: Literal["test", "val"] = "test"
    search_images: Annotated[int, Field(ge=8)] = 128
    effort: Positive = 60
    seed: Seed = 0
    data_root: Text | None = None
    runtimes: list[Literal["eager", "openvino", "onnx"]] = []
    batches: list[Count] = [1, 8]
    timed: list[str] = []
    rounds: Count = 15
    clock: Literal["wall", "processor"] = "wall"
    output: Text


# --- from a composed config to these, and what is wrong with it on one line -----------------------------------------

Kind = TypeVar("Kind", bound=Group)


def parse(kind: type[Kind], cfg: Any) -> Kind:
    """``cfg``, composed or read from a file, as `kind`. Raises UserError for the first field that is wrong."""
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError(_line(kind, plain, error)) from None


def _line(kind: type[BaseModel], value: Any, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path: list[str] = []
    annotation: Any = kind
    field: FieldInfo | None = None
    for part in first["loc"]:
        fields = getattr(annotation, "model_fields", {})
        if not fields or (first["type"] == "extra_forbidden" and part not in fields):
            break
        path.append(str(part))
        field, value = fields[part], value.get(part) if isinstance(value, dict) else value
        annotation = field.annotation
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        name, known = str(first["loc"][-1]), [*annotation.model_fields]
        full = ".".join([*path, name])
        if key == "trainer" and name in OURS:
            return f"{full}={shown(first['input'])}: {OURS[name]}; leave it out"
        hint = did_you_mean(name, known) or f"; {key or 'the config'} has {', '.join(known)}"
        return f"{full}={shown(first['input'])}: there is no setting {full}{hint}"
    if first["type"] == "missing":
        return f"{key}: is missing; give it, as in {key}=VALUE"
    if hasattr(annotation, "model_fields"):
        return f"{key}={shown(value)}: must stay a group of settings; set its keys one by one"
    assert field is not None
    return f"{key}={shown(value)}: must be {in_words(annotation, field.metadata)}"


def in_words(kind: Any, metadata: Any = ()) -> str:
    """What a value of this annotation must be."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return in_words(kind, [*metadata, *(m for extra in more for m in getattr(extra, "metadata", [extra]))])
    for extra in metadata:
        if isinstance(extra, AfterValidator) and isinstance(extra.func, Rule):
            return extra.func.words
    if get_origin(kind) in (Union, types.UnionType):
        arms = [arm for arm in get_args(kind) if arm is not type(None)]
        words = in_words(arms[0] if len(arms) == 1 else float, metadata) if int in arms or len(arms) == 1 else "text"
        separator = ", " if get_origin(arms[0]) is Literal else " or "
        return words + (f"{separator}null" if len(arms) < len(get_args(kind)) else "")
    if get_origin(kind) is Literal:
        names = [shown(value) for value in get_args(kind)]
        return ("one of " if len(names) > 1 else "") + ", ".join(names)
    if kind in (int, float):
        bound = {
            type(extra): getattr(extra, name)
            for extra in metadata
            for name in ("ge", "gt", "le")
            if hasattr(extra, name)
        }
        low, high, open_ = bound.get(Ge, bound.get(Gt)), bound.get(Le), Gt in bound
        span = f" above {low:g}" if open_ else f" of at least {low:g}" if low is not None else ""
        if high is not None:
            span = f" in {'(' if open_ else '['}{low:.10g}, {high:.10g}]"
        return ("a whole number" if kind is int else "a number") + span
    return {bool: "true or false", str: "a name or path"}.get(kind, "a list")


def allows(kind: Any, value: Any) -> bool:
    """Whether a single value is what an annotation says."""
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError:
        return False
    return True
