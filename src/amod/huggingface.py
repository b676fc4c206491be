"""``convert`` for transformers' encoders of images and text; how a pass runs is in ``huggingface_walk.py``.

The copy is of the model's own class, by an on-the-fly subclass of the same name, with its parameter names; a linear
router adds ``<its layer>.router.weight``. The plan is also in its config, so that whatever saves the model saves it.
These files are imported when such a model is given.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from amod import text
from amod.dress import Dressed, dress, undressed
from amod.entries import READS_ATTENTION, Route
from amod.errors import UserError, one_line
from amod.flops import count_on_meta, input_size_of, on_meta, within_budget
from amod.huggingface_walk import IMPLEMENTATION, RoutedBaseModel, RoutedEncoder, RoutedLayer, RoutedModel, Step
from amod.plan import Plan, as_data, check_plan, from_data, make_plan
from amod.routers import ROUTERS, make_router

SERVED = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "clip_vision_model": 1,
    "bert": 1,
    "roberta": 1,
    "xlm-roberta": 1,
    "camembert": 1,
    "modernbert": 1,
}
"""``config.model_type`` -> how many class tokens there are; register tokens come on top."""
FORMAT = 1
"""Of the entry ``amod`` in config.json; ``hub.py`` checks it."""
LAYERS = ("layers", "layer")
"""What transformers calls the list of an encoder's layers."""


def check_model(model: Any) -> None:
    """UserError unless there is one encoder in the model that can be routed."""
    if any(isinstance(module, Dressed) for module in model.modules()):
        raise UserError("the model is routed already: convert the model it was made from, or amod.dense(model)")
    find_encoder(model)


def find_encoder(model: Any) -> tuple[Any, Any]:
    """The module that owns the layers, and the list of its layers."""
    found = {}
    for name, module in model.named_modules():
        lists = [value for at in LAYERS if isinstance(value := getattr(module, at, None), nn.ModuleList)]
        if lists and getattr(getattr(module, "config", None), "model_type", None) in SERVED:
            found[name] = module, lists[0]
    kind = f"transformers' {type(model).__name__}"
    if not found:
        raise UserError(
            f"{kind} cannot be routed: its model_type is {model.config.model_type}; served are {', '.join(SERVED)}, "
            "detr, and with router=tuning causal language models such as llama, mistral, qwen3 and gemma3_text"
        )
    if len(found) > 1:
        raise UserError(f"{kind} has several encoders, {' and '.join(found)}: convert one of them and put it back")
    ((encoder, layers),) = found.values()
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UserError(
            f"{kind} cannot be routed as a decoder: which token is kept depends on later ones; use an encoder"
        )
    return encoder, layers


def depth_of(model: Any) -> int:
    return len(find_encoder(model)[1])


def routed(model: Any, plan: Plan) -> Any:
    """The copy of ``model`` that follows a checked plan."""
    routes: dict[int, Route] = {}
    for i, entry in plan.items():
        if not isinstance(entry, Route):
            raise UserError(
                f"plan: block {i}, {entry}: transformers' encoders are served by Route alone; use a model of timm's, "
                "or for gates one of its causal language models"
            )
        if entry.router not in ROUTERS:
            raise UserError(f"plan: block {i} has router={entry.router!r}; choose one of {', '.join(ROUTERS)}")
        if entry.skip != "block":
            raise UserError(f"plan: block {i} has skip={entry.skip!r}, which encoders of transformers do not have")
        if entry.memory or entry.router == "class_attention_value":
            what = f"memory={entry.memory:g}" if entry.memory else f"router={entry.router}"
            raise UserError(f"plan: block {i} has {what}, which models of transformers do not have; leave it out")
        routes[i] = entry
    model = copy.deepcopy(model)
    encoder, layers = find_encoder(model)
    config, device = encoder.config, next(model.parameters()).device
    classes, prefix = SERVED[config.model_type], prefix_of(config)
    for i, layer in enumerate(layers):
        dress(layer, RoutedLayer)
        if i in routes:
            layer.router = make_router(routes[i].router, config.hidden_size, routes[i].activation)
            layer.router.to(device).train(model.training)
        reader = routes[i + 1].router if i + 1 in routes else ""
        differentiable = reader != "" and ROUTERS[reader].differentiable
        layer.step = Step(i, routes.get(i), prefix, bool(classes), READS_ATTENTION.get(reader), differentiable)
    dress(encoder, RoutedBaseModel if encoder is model else RoutedEncoder)
    if encoder is not model:
        dress(model, RoutedModel)
    model.plan = dict(plan)
    model.attention_before = config._attn_implementation
    model.config.amod = {"format": FORMAT, "plan": as_data(plan)}
    owner_of(model, encoder).set_attn_implementation(IMPLEMENTATION)
    return model


def owner_of(model: Any, encoder: Any) -> PreTrainedModel:
    """The smallest of transformers' models in which the encoder is."""
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(e is encoder for e in m.modules())]
    return owners[-1]


def dense(model: Any) -> Any:
    """The model that a routed one's weights are, every layer whole: a copy; the routers stay behind."""
    said = [
        vars(m)["attention_before"] for m in model.modules() if "attention_before" in vars(m)
    ]  # by a part, it may be
    plain = undressed(model)
    if said:
        owner_of(plain, find_encoder(plain)[0]).set_attn_implementation(said[0])
    return plain


def plan_for_budget(
    model: Any,
    budget: float,
    router: str,
    placement: str | Sequence[int] | None,
    options: Mapping[str, Any],
    input_size: Any = None,
) -> Plan:
    """The plan of the capacity which costs most without exceeding ``budget`` MACs at ``input_size``."""
    size, (_, layers) = input_size_of(model, input_size), find_encoder(model)
    tokens, what = tokens_of(model, size)

    def plan_of(kept: int) -> Plan:
        return make_plan(len(layers), router, kept / tokens, placement, **options)

    bare, every = on_meta(model), range(1, tokens + 1)
    what = f"router={router} in blocks {[*plan_of(1)]} of this model at {what}"
    return plan_of(within_budget(every, lambda k: count_on_meta(routed(bare, plan_of(k)), size), budget, what, float))


def tokens_of(model: Any, size: Any) -> tuple[int, str]:
    """N of a text of ``size`` tokens or an image of (channels, height, width), and that size in words."""
    if isinstance(size, int):
        return size, f"{size} tokens"
    config = find_encoder(model)[0].config
    patches = (size[1] // config.patch_size) * (size[2] // config.patch_size)
    return patches + prefix_of(config), f"{size[1]} x {size[2]} pixels"


def prefix_of(config: Any) -> int:
    """How many class and register tokens are in front."""
    return SERVED[config.model_type] + (getattr(config, "num_register_tokens", 0) or 0)


# --- files --------------------------------------------------------------------------------------------------------


def save_pretrained(model: Any, folder: str | Path) -> None:
    """transformers' own; the plan is in the config."""
    if not isinstance(model, RoutedModel):
        for name, module in model.named_modules():
            if isinstance(module, RoutedModel):
                raise UserError(
                    f"{name}: was converted by itself, and its plan would not be found; convert the whole model"
                )
    model.save_pretrained(folder)


def from_pretrained(source: str | Path, config: Mapping[str, Any]) -> Any:
    """The model of a folder or hub id whose ``config.json`` is given, routed by the plan that it holds, if any."""
    name = next(iter(config.get("architectures") or []), None)
    kind = getattr(transformers, name or "AutoModel", None)
    if kind is None:
        raise UserError(
            f"{source}: transformers {transformers.__version__} has no {name}; install the one that saved it"
        )
    try:
        with routers_expected(kind):
            model = kind.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # whatever transformers makes of the files
        raise UserError(f"{source}: transformers cannot load its {name} ({one_line(error)})") from error
    ours = config.get("amod") or {}
    if not ours.get("plan"):
        return model.eval()
    plan = from_data(ours["plan"])
    gated = text.is_served(model)
    check_plan(plan, text.depth_of(model) if gated else depth_of(model))
    model = text.routed(model, plan) if gated else routed(model, plan)
    layers, missing = (next(text.decoders(model)).layers if gated else find_encoder(model)[1]), []
    saved = saved_routers(Path(source))
    for i, layer in enumerate(layers):
        for key, value in layer.router.named_parameters() if i in model.plan else ():
            if saved.get((i, key), value[:0]).shape != value.shape:
                missing.append(f"layer {i}'s router.{key}")
            else:
                value.data.copy_(saved[i, key])
    if missing:
        raise UserError(
            f"{source}: has no weights of {', '.join(missing)} that its plan needs; save the routed model again, or, "
            "if this was saved from the dense one, take amod out of its config.json"
        )
    return model.eval()


@contextmanager
def routers_expected(kind: Any) -> Iterator[None]:
    """transformers' report of what it loads leaves out the routers, which are read after it."""
    name = "_keys_to_ignore_on_load_unexpected"
    known = getattr(kind, name, None)
    setattr(kind, name, [*(known or []), r"\.(memory_)?router\."])
    try:
        yield
    finally:
        setattr(kind, name, known)


def saved_routers(folder: Path) -> dict[tuple[int, str], Tensor]:
    """What the weight files of a folder hold of routers: by layer and name, whatever the layers are called there."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118, it is no dict
                if match := re.search(r"\.(\d+)\.router\.(\w+)$", key):
                    found[int(match[1]), match[2]] = weights.get_tensor(key)
    return found
