"""model.task=detection: images and the boxes in them, by DETR. A file of a task, see ``tasks.py``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_convert
from transformers import DetrConfig, DetrForObjectDetection
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import apply_renamings

from amod.detection import convert, layers_of, transformer_flops
from amod.detr_walk import RoutedDetr
from amod.errors import UserError, misfits, one_line
from amod.flops import count_flops, on_meta
from amod.plan import BY_THEMSELVES
from amod.training.coco import CocoData, about, load
from amod.training.config import TrainConfig, Variant
from amod.training.finished import weights_of, with_weights
from amod.training.module import Batch, TaskModule
from amod.training.record import classes_of, read_record, say_origin
from amod.training.tasks import DETECTION
from amod.training.terminal import say
from amod.training.weights import Built, head_classes, placement_of, read_state, shortened, weightless

log = logging.getLogger(__name__)
PUBLISHED = {"resnet50": "facebook/detr-resnet-50", "resnet101": "facebook/detr-resnet-101"}
"""facebookresearch's weights on the hub, by backbone; transformers knows their format."""
HEAD = "class_labels_classifier."
IMAGE_SHAPE = 4 / 3
"""Width to height of the image that the cost is of: 1066 x 800, as in the paper."""


Boxes = Sequence[Mapping[str, Tensor]]


class MeanAP(Metric):
    """COCO's mean average precision, by torchmetrics. Its own class keeps tensors for each image, which processes with
    unequal numbers of images cannot gather; here are rows of numbers instead.
    """

    full_state_update = False
    found: list[Tensor]
    wanted: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("wanted", [], dist_reduce_fx="cat")

    def update(self, found: Boxes, targets: Boxes, ids: Tensor) -> None:
        """Boxes found and true, of images by their place in the data."""
        self.found += [_rows(i, d["boxes"], d["labels"], d["scores"]) for i, d in zip(ids, found, strict=True)]
        self.wanted += [_rows(i, t["xyxy"], t["kinds"], t["iscrowd"]) for i, t in zip(ids, targets, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        found, wanted = (dim_zero_cat(state).view(-1, 7).cpu() for state in (self.found, self.wanted))
        images = found[:, 0].unique()  # every query finds something
        metric = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False)
        metric.update(
            [{"boxes": m[:, 1:5], "labels": m[:, 5].long(), "scores": m[:, 6]} for m in _split(found, images)],
            [{"boxes": m[:, 1:5], "labels": m[:, 5].long(), "iscrowd": m[:, 6].long()} for m in _split(wanted, images)],
        )
        computed = metric.compute()
        return {name: computed[name].to(self.device) for name in ("map", "map_50")}


def _rows(image: Tensor, boxes: Tensor, kinds: Tensor, last: Tensor) -> Tensor:
    columns = [image.expand(len(kinds)), *boxes.unbind(1), kinds, last]
    return torch.stack([column.float() for column in columns], dim=1).flatten()  # bfloat16 counts images up to 256


def _split(rows: Tensor, images: Tensor) -> Sequence[Tensor]:
    rows = rows[rows[:, 0].argsort(stable=True)]
    return rows.tensor_split(torch.searchsorted(rows[:, 0].contiguous(), images)[1:])


class Detector(TaskModule):
    """A batch is images (B, 3, H, W), masks (B, H, W), targets, indices (B,); see ``coco.py``."""

    task = DETECTION

    def own_metrics(self) -> dict[str, Metric]:
        return {"map": MeanAP()}

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """The backbone has a rate of its own, which follows the same schedule."""
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[".backbone." in f".{name}"].append(parameter)
        s = self.schedule
        backbone = lr if s.backbone_lr is None else lr * s.backbone_lr / s.lr
        parts = [{"params": groups[False], "lr": lr}, {"params": groups[True], "lr": backbone}]
        return create_optimizer_v2(parts, opt=s.optimizer, lr=lr, weight_decay=s.weight_decay, momentum=s.momentum)  # type: ignore[arg-type]

    def loss(self, batch: Batch) -> Tensor:
        images, masks, targets, _ = batch
        return self.model(images, pixel_mask=masks, labels=targets).loss

    def measure(self, metrics: Any, batch: Batch) -> tuple[Tensor, Any]:
        images, masks, targets, ids = batch
        out = self.evaluated(images, pixel_mask=masks, labels=targets)
        found = detections(out, [target["size"] for target in targets])
        metrics["map"].update(found, targets, ids)
        return out.loss, found

    def values(self, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        """mAP over IoU 0.5 to 0.95 (COCO's), and at 0.5, in percent."""
        return {
            "loss": computed["loss"],
            "map": 100 * computed["map"].float(),
            "map50": 100 * computed["map_50"].float(),
        }


def detections(out: Any, sizes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Every query's best class, score and box, left, top, right, bottom in pixels of an image of that (height, width).

    As transformers' ``post_process_object_detection`` with a threshold of 0.
    """
    scores, labels = out.logits.float().softmax(-1)[..., :-1].max(-1)
    boxes = box_convert(out.pred_boxes.float(), "cxcywh", "xyxy")
    scale = torch.stack([size.flip(0).repeat(2) for size in sizes]).to(boxes)
    boxes = boxes * scale[:, None]
    return [{"scores": s, "labels": k, "boxes": b} for s, k, b in zip(scores, labels, boxes, strict=True)]


# --- the parts of the task ----------------------------------------------------------------------------------------


def read(cfg: TrainConfig) -> CocoData:
    return data_of(cfg, load(cfg.data))


def data_of(cfg: TrainConfig, splits: Mapping[str, Any]) -> CocoData:
    return CocoData(cfg.data, splits, image_size(cfg), cfg.schedule, cfg.seed)


def image_size(cfg: Variant) -> list[int]:
    if cfg.model.image_size is None:
        raise UserError("model.image_size=null: say [shorter side, longest], as in model.image_size=[800,1333]")
    return cfg.model.image_size


def build(cfg: Variant, data: CocoData) -> Built:
    return build_detr(cfg, data.class_names, data.source.ids)


def build_detr(cfg: Variant, classes: Sequence[str], ids: Sequence[int]) -> Built:
    """The DETR that ``model``, ``router``, ``placement`` and ``capacity`` ask for, its weights loaded.

    A head of other classes is left out. COCO's published one, which counts up to the highest number of a category in
    the annotation file, is cut to the categories that there are.
    """
    if cfg.router.name in ("isoflop", "plan", *BY_THEMSELVES):
        raise UserError(f"router={cfg.router.name}: not for a DETR; choose none, attention, linear, random or reversed")
    model, adapted, known = create(cfg, len(classes)), False, None
    state: dict[str, Tensor] = {}
    if cfg.model.checkpoint is not None:
        checkpoint = Path(cfg.model.checkpoint)
        state, known = read_state(checkpoint, prefixes=()), head_classes(checkpoint)
        if inner := next((p for p in ("ema.module.", "model.model.") if any(k.startswith(p) for k in state)), None):
            cut = inner.removesuffix("model.") if inner.startswith("model.") else inner
            state = {key.removeprefix(cut): value for key, value in state.items() if key.startswith(cut)}
    elif cfg.model.pretrained:
        state = published(cfg).state_dict()
    if state:
        adapted = load_detr(model, state, cfg, classes, ids, known)
    routed = variant(model, cfg)
    routers = {key: value for key, value in state.items() if "router." in key}
    wanted = {key for key in routed.state_dict() if "router." in key}
    if routers.keys() & wanted:
        routed.load_state_dict({key: routers[key] for key in routers.keys() & wanted}, strict=False)
    if state and (fresh := sorted(wanted - routers.keys())):
        log.info("routers that start from fresh weights: %s", shortened(fresh))
    return Built(routed, adapted)


def create(cfg: Variant, num_classes: int) -> DetrForObjectDetection:
    """The dense DETR with random weights, as the original begins: Xavier in encoder and decoder, queries from a normal
    distribution, torch's defaults elsewhere. transformers' own beginning is much smaller, and detr_pico learns nothing
    from it.
    """
    given = cfg.model.kwargs.arguments()
    backbone = {
        "model_type": "timm_backbone", "backbone": cfg.model.name, "features_only": True,
        "use_pretrained_backbone": False, "num_channels": 3, "out_indices": given.pop("out_indices", [1, 2, 3, 4]),
    }  # fmt: skip
    try:
        given |= {"num_labels": num_classes, "auxiliary_loss": True}
        config = DetrConfig(backbone_config=backbone, **given)
        heads = config.encoder_attention_heads, config.decoder_attention_heads
        if any(config.d_model % n for n in (4, *heads)):
            raise ValueError(f"d_model {config.d_model} must be a multiple of 4 and of the heads {heads}")
        model = DetrForObjectDetection(config)
    except Exception as error:  # whatever timm and transformers make of them
        what = f"model.name={cfg.model.name} with model.kwargs={given}"
        raise UserError(f"{what}: no DETR can be made of it ({one_line(error)})") from error
    for part in (model.model.encoder, model.model.decoder):
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    nn.init.normal_(model.model.query_position_embeddings.weight)
    for module in (model.model.input_projection, model.class_labels_classifier, *model.bbox_predictor.layers):
        module.reset_parameters()
    if cfg.model.name.startswith("resnet"):  # the original trains its last three stages
        for name, parameter in model.model.backbone.named_parameters():
            parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))
    return model


def published(cfg: Variant) -> DetrForObjectDetection:
    if cfg.model.name not in PUBLISHED:
        names = ", ".join(PUBLISHED)
        raise UserError(f"model.pretrained=true: there are published weights with the backbones {names} alone")
    try:
        return DetrForObjectDetection.from_pretrained(PUBLISHED[cfg.model.name])
    except Exception as error:  # no network, a damaged file: whatever the clients raise
        raise UserError(
            f"model.pretrained=true: {PUBLISHED[cfg.model.name]} is not in the hub's cache and cannot be fetched "
            f"({one_line(error)}); or give model.checkpoint=FILE, or model.pretrained=false"
        ) from error


def load_detr(
    model: Any, state: Mapping[str, Tensor], cfg: Variant, classes: Sequence[str], ids: Sequence[int], known: Any
) -> bool:
    """Load a state dict; whether its head is for these classes."""
    names: Any = get_model_conversion_mapping(model)  # in files some parts have the names of older versions
    state = {apply_renamings(key, names): value for key, value in state.items() if "router." not in key}
    wanted = model.state_dict()
    rows = len(state.get(HEAD + "bias", ()))
    adapted = rows == len(classes) + 1 and known in (None, [*classes])
    if not adapted and rows == max(ids) + 2 and known is None:
        state |= {key: state[key][[*ids, -1]] for key in (HEAD + "weight", HEAD + "bias")}
        adapted = True
    if not adapted:
        log.info("the weights' head is for other classes (%d): a new one for %d is trained", rows - 1, len(classes))
        state |= {key: value for key, value in wanted.items() if key.startswith(HEAD)}
    if problems := misfits(wanted, state):
        raise UserError(
            f"model.checkpoint={cfg.model.checkpoint}: is no checkpoint of {cfg.model.label} as configured: "
            f"{shortened(problems)}; choose the model= it was trained with"
        )
    model.load_state_dict(state)
    return adapted


def variant(model: Any, cfg: Variant) -> RoutedDetr:
    """``model`` with the config's routing. Dense ones are converted too: their auxiliary losses are the original's."""
    if cfg.budget is not None or cfg.placement.last is not None:
        name = "budget" if cfg.budget is not None else "placement.last"
        raise UserError(f"{name}: a DETR does not have it; leave it out")
    router = cfg.router.name
    if router == "none":
        return convert(model, "none")
    if cfg.router.keep_prefix or cfg.router.memory or cfg.router.skip not in (None, "block"):
        raise UserError("router: a DETR has no keep_prefix, memory or skip; leave them out")
    return convert(model, router, cfg.capacity, placement_of(cfg), activation=cfg.router.activation)


def module(model: nn.Module, cfg: TrainConfig, data: CocoData) -> Detector:
    return Detector(model, cfg.schedule, cfg.seed)


def cost(model: Any, cfg: Variant) -> dict[str, Any]:
    """At one image of the model's size, with the sides of the paper's; tokens are the image's in the encoder."""
    short, longest = image_size(cfg)
    height, width = short, min(longest, int(short * IMAGE_SHAPE))
    plan = model.plan
    pixels = torch.zeros(1, 3, height, width, device="meta")
    bare: Any = on_meta(model)
    with torch.no_grad():
        tokens = bare.model.backbone(pixels, pixels[:, 0])[-1][1].numel()
    kept = {i: entry.kept(tokens) for i, entry in sorted(plan.encoder.items())}
    return {
        "router": cfg.router.name,
        "budget": None,
        "capacity": cfg.capacity if plan.encoder else 1.0,
        "capacity_granted": min(kept.values(), default=tokens) / tokens,
        "tokens": tokens,
        "tokens_kept": {str(i): count for i, count in kept.items()},
        "blocks_routed": [*kept],
        "depth": sum(layers_of(model)),
        "gflops": count_flops(model, (3, height, width)) / 1e9,
        "gflops_transformer": transformer_flops(model, height, width) / 1e9,
        "params": sum(p.numel() for p in model.parameters()),
    }


def measured(model: nn.Module, data: CocoData) -> None:
    """Every image costs what its size costs."""


def keep(cfg: TrainConfig, folder: Path) -> None:
    """Nothing: the config says all of the model."""


def load_measured(folder: Path, run: TrainConfig, split: str) -> tuple[nn.Module, CocoData]:
    """The model, and the images of ``split`` as the test images of a data module."""
    weights_of(folder)
    if split == "all":
        raise UserError("split=all: a detector is measured on one split; choose test (val2017) or val")
    images = load(run.data, only_test=split == "test")[split]
    record = read_record(folder)
    if record is not None and record["classes"] != images.source.classes:
        raise UserError(f"data.root={run.data.root}: has other categories than run={folder}; name its own data")
    say(f"{split}: {len(images)} images")
    say_origin(split, about(images), record)
    model = load_model(folder, run)
    return model, data_of(run, {"test": images})


def load_model(folder: Path, run: TrainConfig) -> Any:
    """The model of a finished run, with the best epoch's weights, in evaluation mode."""
    weights_of(folder)  # said before anything is built
    classes = classes_of(folder) or []
    return with_weights(build_detr(weightless(run), classes, range(len(classes))).model, folder)
