"""A timm model with weights from the hub's cache or a local file, made into the variant that a config asks for."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.utils import get_session
from safetensors import safe_open
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from amod.errors import UserError, misfits, one_line
from amod.families import check_model
from amod.files import CONFIG, ROUTERS, WEIGHTS
from amod.flops import count_flops
from amod.plan import MERGING, from_data
from amod.training.config import WITHOUT_CAPACITY, Model, Placement, Router, Variant
from amod.training.record import classes_of, differ
from amod.training.variants import gates_of
from amod.vit import PAPER_DEPTHS, convert, isoflop_depth, truncate

log = logging.getLogger(__name__)

HEADS = ("head.weight", "head.fc.weight")
"""The keys of a classifier's weights (C, D), one or the other."""


@dataclass(frozen=True)
class Built:
    """A model, and whether its head came with its weights: then its accuracy before any training means something.

    ``fresh``: its routers' weights that the checkpoint did not have.
    """

    model: nn.Module
    adapted: bool
    fresh: Sequence[str] = ()


def create_vit(model: Model, num_classes: int, **pretrained: Any) -> Any:
    """The timm model of a ``model`` config. Raises UserError for a name or an argument that timm does not have.

    ``pretrained`` are timm.create_model's arguments that load weights; none of them: random weights.
    """
    name = model.name
    kwargs = model.kwargs.arguments()
    try:
        known = timm.is_model(name)
    except ValueError:
        known = False
    if not known:
        models = timm.list_models("*vit*") + timm.list_models("deit*")
        close = difflib.get_close_matches(name.partition(".")[0], models, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"model.name={name}: timm {timm.__version__} has no such model{hint}")
    try:
        vit = timm.create_model(
            name, num_classes=num_classes, drop_path_rate=model.drop_path, **{**kwargs, **pretrained}
        )
    except Exception as error:  # whatever timm and torch make of them
        if pretrained:
            raise  # of the weights: pretrained_vit says where they should be
        raise UserError(f"model.name={name} with model.kwargs={kwargs}: timm refuses: {one_line(error)}") from error
    try:
        check_model(vit)
    except UserError as error:
        raise UserError(f"model.name={name}: {error}") from None
    return vit


def input_config(model: Model) -> dict[str, Any]:
    """What images the model takes: timm's resolve_model_data_config, at the image size that was asked for."""
    with torch.device("meta"):
        vit = create_vit(model, num_classes=1)
    return {**resolve_model_data_config(vit), "input_size": (vit.in_chans, *vit.patch_embed.img_size)}


def build(cfg: Variant, num_classes: int, classes: Sequence[str] | None = None) -> Built:
    """The model that ``model``, ``router``, ``placement`` and ``capacity`` ask for, its weights loaded.

    ``classes``: their names, where they are known. A head that was made for others is left out.
    """
    state: dict[str, Tensor] = {}
    pretrained_head = False
    if cfg.model.checkpoint is not None:
        vit = create_vit(cfg.model, num_classes)
        state = read_state(Path(cfg.model.checkpoint))
        state = without_foreign_head(state, head_classes(Path(cfg.model.checkpoint)), classes)
    elif cfg.model.pretrained:
        vit = pretrained_vit(cfg.model, num_classes)
        pretrained_head = head_is_pretrained(cfg, num_classes, classes)
        if not pretrained_head:
            vit.reset_classifier(num_classes)
    else:
        vit = create_vit(cfg.model, num_classes)

    routers = {key: state.pop(key) for key in list(state) if key.startswith("routers.")}
    if cfg.router.name != "isoflop":
        adapted = load_vit(vit, state, cfg.model) if state else pretrained_head
        model = variant(vit, cfg)
        fresh = load_routers(model, routers, cfg.model) if state else router_names(model)
        return Built(model, adapted, fresh)

    depth = isoflop_blocks(vit, cfg)
    blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if state and blocks == depth:  # an isoFLOP model's own checkpoint
        vit = truncate(vit, depth)
        return Built(vit, load_vit(vit, state, cfg.model))
    adapted = load_vit(vit, state, cfg.model) if state else pretrained_head
    short = truncate(vit, depth)
    log.info("isoFLOP: the first %d of %d blocks are kept", depth, len(vit.blocks))
    return Built(short, adapted)


def weightless(cfg: Any) -> Any:
    """The config without the source of its weights."""
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"checkpoint": None, "pretrained": False})})


def variant(vit: Any, cfg: Variant) -> nn.Module:
    """What `vit` becomes by the config's router: itself for router=none, unless its last block is told otherwise."""
    router, last = cfg.router, cfg.placement.last
    if router.plan is not None:
        return convert(vit, plan=from_data(router.plan))
    if router.name == "none" and last is None:
        return vit
    if router.name == "none":
        return convert(vit, router="none", last=last)
    if router.name == "tuning":
        layers = beside_last(router.layers, vit, last)
        return convert(vit, router="tuning", layers=layers, last=last, **gates_of(router))
    return convert(
        vit,
        router=router.name,
        capacity=None if router.name in WITHOUT_CAPACITY or cfg.budget is not None else cfg.capacity,
        placement=beside_last(placement_of(cfg), vit, last),
        keep_prefix=router.keep_prefix,
        activation=router.activation,
        memory=router.memory,
        skip=router.skip,
        r=None if cfg.budget is not None else router.r,
        keep_rate=None if cfg.budget is not None else router.keep_rate,
        fuse=router.fuse,
        by=router.by if router.name in MERGING else None,
        rounds=router.rounds if router.name in MERGING else None,
        norm=router.norm if router.name in MERGING else None,
        proportional=router.proportional if router.name in MERGING else None,
        halt_scale=router.halt_scale if router.name == "avit" else None,
        halt_shift=router.halt_shift if router.name == "avit" else None,
        last=last,
        budget=budget_of(vit, cfg),
    )


def beside_last(blocks: Any, vit: Any, last: str | None) -> Any:
    """Of a run of before, which could list the class token's block and have it do nothing else."""
    return [i for i in blocks if i != len(vit.blocks) - 1] if last and isinstance(blocks, list) else blocks


def teacher_of(cfg: Variant, num_classes: int, classes: Sequence[str] | None) -> nn.Module:
    """The dense model that the run starts from; without weights where a resumed run's checkpoint has them."""
    plain = {"router": Router(name="none"), "placement": Placement(name="own"), "budget": None}
    with torch.random.fork_rng(devices=[]):  # the run draws what it would draw without a teacher
        built = build(cfg.model_copy(update=plain), num_classes, classes)
    if not built.adapted and (cfg.model.checkpoint is not None or cfg.model.pretrained):
        raise UserError(
            f"distil={cfg.distil:g}: the weights that the run starts from have no head for these classes, so they "
            "teach none; train a dense model first (router=none) and give its folder as model.checkpoint="
        )
    return built.model


def placement_of(cfg: Variant) -> str | list[int] | None:
    """A name, block indices, or None: the blocks that the method has by itself."""
    if cfg.placement.blocks is not None:
        return list(cfg.placement.blocks)
    return None if cfg.placement.name == "own" else cfg.placement.name


def budget_of(vit: Any, cfg: Variant) -> float | None:
    """``budget`` in FLOPs: a share is of what ``vit``, the dense model, costs at its own image size."""
    if isinstance(cfg.budget, str):
        return float(cfg.budget.rstrip("%")) / 100 * count_flops(vit, (vit.in_chans, *vit.patch_embed.img_size))
    return None if cfg.budget is None else cfg.budget * 1e9


def isoflop_blocks(vit: Any, cfg: Variant) -> int:
    """Depth of the isoFLOP model: router.depth, else by the budget, else the paper's pin, else amod.isoflop_depth."""
    size = (vit.in_chans, *vit.patch_embed.img_size)
    if (depth := cfg.router.depth) is not None:
        return depth
    if (budget := budget_of(vit, cfg)) is not None:
        fits = [d for d in range(1, len(vit.blocks) + 1) if count_flops(truncate(vit, d), size) <= budget]
        if not fits:
            raise UserError(f"budget={cfg.budget}: even one block of {cfg.model.name} costs more GFLOPs; raise it")
        return max(fits)
    if cfg.placement.blocks is None and cfg.placement.name == "alternate" and not cfg.model.kwargs.arguments():
        pinned = PAPER_DEPTHS.get(cfg.model.name.partition(".")[0], {}).get(cfg.capacity)
        if pinned is not None:
            return pinned
    return isoflop_depth(vit, cfg.capacity, placement_of(cfg), size)


# --- pretrained weights -------------------------------------------------------------------------------------------


def pretrained_vit(model: Model, num_classes: int) -> Any:
    """timm's pretrained model: from the Hugging Face hub's cache, without any network, else fetched into it."""
    cfg = timm.get_pretrained_cfg(model.name)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"model.pretrained=true: timm has no pretrained weights for {model.name}; set model.pretrained=false "
            "or model.checkpoint=FILE"
        )
    folder = f"{HF_HUB_CACHE}/models--{(cfg.hf_hub_id or '').replace('/', '--')}"
    try:
        cached = cached_weights(cfg.hf_hub_id) if cfg.hf_hub_id and not cfg.hf_hub_filename else None
        if cached is not None:
            overlay = {
                **(model.kwargs.arguments().get("pretrained_cfg_overlay") or {}),
                "file": cached,
                "custom_load": False,
            }
            return create_vit(model, num_classes, pretrained=True, pretrained_cfg_overlay=overlay)
        get_session().head(ENDPOINT, timeout=10)  # the hub's own client would try for a minute before it gives up
        return create_vit(model, num_classes, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # no network, a proxy, a refused or damaged file: whatever the clients raise
        raise UserError(
            f"model.pretrained=true: no usable weights of {model.name} in {folder}, and none could be fetched "
            f"({one_line(error)}); run once with a network, or set HF_HOME to a cache that holds them, or give "
            "model.checkpoint=FILE, or train from scratch with model.pretrained=false"
        ) from error


def cached_weights(repo: str) -> str | None:
    """The weights file of a repository ("timm/NAME", "timm/NAME@REVISION") in the hub's cache, if it is there."""
    name, _, revision = repo.partition("@")
    for file in (WEIGHTS, "pytorch_model.bin"):
        path = try_to_load_from_cache(name, file, revision=revision or None)
        if isinstance(path, str):
            return path
    return None


def head_is_pretrained(cfg: Variant, num_classes: int, classes: Sequence[str] | None) -> bool:
    """Whether timm's head is for the classes of the data: as many, and by their names."""
    known = timm.get_pretrained_cfg(cfg.model.name)
    count = known.num_classes if known else None
    if count != num_classes:
        log.info("the pretrained head has %s classes, the data %d: a new head is trained", count, num_classes)
        return False
    if classes is None or cfg.data.name == "imagenet":
        return True
    subset = infer_imagenet_subset(known.to_dict()) if known else None
    names = (known and known.label_names) or (subset and ImageNetInfo(subset).label_names()) or ()
    if other := differ(names, classes):
        log.info("the pretrained head is for other classes than the data's (%s): a new head is trained", other)
    return not other


# --- checkpoints --------------------------------------------------------------------------------------------------


def read_state(path: Path, prefixes: Sequence[str] = ("ema.module.", "model.")) -> dict[str, Tensor]:
    """A model's state dict from .safetensors, a timm .pth/.pt, our .ckpt, a run folder or one of a saved model. Never
    runs pickled code."""
    if path.is_dir():
        names = ("weights.safetensors", "checkpoints/best.ckpt", "checkpoints/last.ckpt", WEIGHTS)
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise UserError(f"model.checkpoint={path}: this run has no checkpoint yet")
        path = found[0]
        if path.suffix == ".ckpt":
            log.warning("warning: %s is not finished; its weights so far are taken, of %s", path.parents[1], path.name)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"model.checkpoint={path}: no such file") from error
    except Exception as error:  # whatever the bytes make the readers raise
        if "weights_only" in str(error):
            raise UserError(
                f"model.checkpoint={path}: refused, it holds more than tensors (pickled code would run); save the "
                "state dict alone, best as .safetensors"
            ) from error
        raise UserError(f"model.checkpoint={path}: cannot be read as a checkpoint ({one_line(error)})") from error
    if path.name == WEIGHTS and (routers := path.with_name(ROUTERS)).is_file():
        state |= load_state_dict(str(routers))
    for prefix in prefixes:  # our own .ckpt: the moving average where there is one
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            break
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.checkpoint={path}: holds no state dict of tensors; give a model's weights")
    return state


def head_classes(path: Path) -> list[str] | None:
    """The names of the classes that a checkpoint's head is for, which run folders, saved models and our safetensors
    know."""
    try:
        if path.suffix == ".safetensors" and path.is_file():
            with safe_open(path, "pt") as file:
                return json.loads((file.metadata() or {})["classes"])
        if (path / WEIGHTS).is_file():
            return json.loads((path / CONFIG).read_text(encoding="utf-8")).get("label_names")
    except Exception:  # none of ours, or none at all: read_state says so
        return None
    folders = [path.parent, path.parent.parent] if path.is_file() else [path]
    runs = [folder for folder in folders if (folder / "config.yaml").exists()]
    return next((classes for folder in runs if (classes := classes_of(folder))), None)


def without_foreign_head(
    state: dict[str, Tensor], known: Sequence[str] | None, classes: Sequence[str] | None
) -> dict[str, Tensor]:
    """`state` as it is where its head is for `classes`, as far as is known."""
    if known is None or classes is None or not (other := differ(known, classes)):
        return state
    log.info("the checkpoint's head is for other classes than the data's (%s)", other)
    return {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist."))}


def load_vit(vit: Any, state: dict[str, Tensor], model: Model) -> bool:
    """Load a state dict into `vit`; whether the head fitted.

    A head of other classes is left out and said so, position embeddings of another image size are resized by timm and
    said so. Any other difference is a UserError that lists the keys.
    """
    wrong = f"model.checkpoint={model.checkpoint}: is no checkpoint of {model.label}"
    wanted = vit.state_dict()
    embedding = state.get("pos_embed")
    patch, wanted_patch = state.get("patch_embed.proj.weight"), wanted["patch_embed.proj.weight"]
    if patch is None or patch.dim() != 4 or patch.shape == wanted_patch.shape:
        try:
            own = sys.modules[type(vit).__module__]  # timm's, of this family
            state = getattr(own, "checkpoint_filter_fn", lambda state, vit: state)(dict(state), vit)
        except Exception as error:  # timm's reshaping of a checkpoint that is not this model's
            raise UserError(f"{wrong} ({one_line(error)})") from error
    if embedding is not None and "pos_embed" in state and state["pos_embed"].shape != embedding.shape:
        log.info("position embeddings resized from %d to %d tokens", embedding.shape[1], state["pos_embed"].shape[1])

    heads = [key for key in wanted if key.startswith(("head.", "head_dist."))]
    adapted = all(key in state and state[key].shape == wanted[key].shape for key in heads)
    if not adapted:
        found = next((len(state[key]) for key in heads if key in state), None)
        log.info(
            "the checkpoint's head %s: a new head of %d classes is trained",
            f"has {found} classes" if found else "is missing",
            len(wanted[heads[0]]),
        )
        state = {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist."))}
        state.update({key: wanted[key] for key in heads})

    if problems := misfits(wanted, state):
        raise UserError(f"{wrong} as configured: {shortened(problems)}; choose the model= it was trained with")
    vit.load_state_dict(state)
    return adapted


def router_names(model: nn.Module) -> list[str]:
    return sorted(key for key in model.state_dict() if key.startswith("routers."))


def load_routers(model: nn.Module, state: dict[str, Tensor], source: Model) -> list[str]:
    """The routers' own weights from a checkpoint; those that it lacks start fresh, are said and returned."""
    wanted = {key: value for key, value in model.state_dict().items() if key.startswith("routers.")}
    if dropped := sorted(set(state) - set(wanted)):
        log.info("router weights of the checkpoint that this model does not use: %s", shortened(dropped))
    if odd := [key for key in wanted if key in state and state[key].shape != wanted[key].shape]:
        raise UserError(
            f"model.checkpoint={source.checkpoint}: {shortened(odd)} of another shape than {source.label}'s; "
            "choose the model= it was trained with"
        )
    if fresh := sorted(set(wanted) - set(state)):
        log.info("routers that start from fresh weights: %s", shortened(fresh))
    model.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    return fresh


def shortened(items: Sequence[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
