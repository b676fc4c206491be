"""``amod.export``: a model as a file for onnxruntime, OpenVINO or torch, and proof that it gives what the model gives.

The file takes ``images`` (B, C, H, W), any B, and any H and W of whole patches where :func:`any_size` says so. It gives
``logits`` (B, classes) and, for every block that routes, ``kept_<block>`` (B, K), the tokens that it kept. How images
are to be prepared, the class names and the plan are in the file's metadata, so the file is all that a program needs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer
from torch import Tensor, nn

from amod.agreement import check_images as check_prepared
from amod.dress import of_transformers
from amod.entries import Halt, Merge, Predict, Prune, Route
from amod.errors import UserError, one_line, reachable, writable
from amod.files import check_place
from amod.flops import Size, dtype_of, input_size_of, modes_kept
from amod.gates import is_gated
from amod.hub import class_names_of
from amod.plan import Plan, as_data
from amod.routing import Routing
from amod.runtimes import SUFFIXES, Session, format_of, needed, open_session
from amod.timm_models import RoutedViT
from amod.walk import Walk

TRACED, CHECKED = 2, (1, 3)
"""Batch sizes: that of the traced images, and those of the check."""


@dataclass(frozen=True)
class Agreement:
    """An exported file against its model, on the same images."""

    images: int
    difference: float
    """The largest of any logit."""
    scale: float
    """The largest logit."""
    tokens: int
    tokens_differ: int
    """Kept by one of the two alone, of all ``tokens`` that the blocks kept: where two scores are nearly equal."""
    top1: float | None
    """Share of the images that get the same class; None: of a model of one output."""

    def __str__(self) -> str:
        kept = f", {self.tokens_differ} of {self.tokens} kept tokens differ" if self.tokens else ""
        same = f", same class for {self.top1:.1%}" if self.top1 is not None else ""
        return f"{self.images} images: logits differ by at most {self.difference:.2g} (of {self.scale:.3g}){kept}{same}"


class Exported(nn.Module):
    """What is exported: images (B, 3, H, W) -> logits, and the kept tokens of the routed blocks in their order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = [
            "logits",
            *(f"kept_{i}" for i, entry in sorted(plan_of(model).items()) if isinstance(entry, Route)),
        ]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, routing = self.walk(images)
        return (logits, *(layer.indices for layer in routing))

    def walk(self, images: Tensor) -> tuple[Tensor, Routing]:
        """Logits, and what the routed blocks did."""
        model: Any = self.model
        if not isinstance(model, RoutedViT):
            return model(images), []
        walk = Walk(model)
        logits = walk.forward_head(walk.forward_features(images))
        return logits, [layer for layer in walk.routing if isinstance(model.plan[layer.layer], Route)]


def plan_of(model: nn.Module) -> Plan:
    return model.plan if isinstance(model, RoutedViT) else {}


def export(
    model: Any,
    path: str | Path,
    format: str | None = None,
    input_size: Size | None = None,
    images: Tensor | None = None,
    int8: bool = False,
) -> Agreement:
    """Write the model to ``path`` for another runtime, check it there, and only then call it done.

    The batch is dynamic; so is the image size where :func:`any_size` says so, otherwise it is ``input_size``'s.

    Args:
        model: of :func:`amod.convert`, or a timm model; it is left as it is.
        path: the file; without ``format`` its suffix says which: ``.onnx``, ``.xml`` (OpenVINO) or ``.pt2`` (torch).
        format: ``onnx``, ``openvino`` or ``torch``.
        input_size: (channels, height, width), by default the model's own.
        images: (B, C, H, W), preprocessed, at least 4: what the check looks at, and what int8 is calibrated on; by
            default random ones.
        int8: quantised by the runtime's own tool (onnxruntime's static quantisation, NNCF), from ``images``.

    Raises:
        UserError: the model, path or format cannot be served, or the file gives other logits. No file is left then.
    """
    if is_gated(model):
        raise UserError("export: what trained gates skip differs from image to image, which no file can say; use torch")
    if of_transformers(model):
        raise UserError(
            f"{type(model).__name__}: is of transformers'; torch.export.export takes it, any batch at one length"
        )
    path = Path(path)
    form = format_of(path, format)
    check(model, path, form, int8, images)
    size = input_size_of(model, input_size)
    dynamic = any_size(model, form)
    images = check_images(images, size, model.patch_embed.patch_size if dynamic else None)
    needed(form, int8)
    check_place(path.parent)
    path.parent.mkdir(exist_ok=True)
    device = next(model.parameters()).device
    with ExitStack() as after:
        after.enter_context(modes_kept(model))
        after.callback(model.to, device)
        exported = Exported(model).eval().cpu()
        generator = torch.Generator().manual_seed(0)
        if images is None:
            images = torch.randn(sum(CHECKED), *size, generator=generator)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".amod-") as folder:
            new = Path(folder) / path.with_suffix(SUFFIXES[form]).name
            program = traced(exported, size, dynamic)
            try:
                WRITERS[form](program, new, exported.names, metadata(model, size, dynamic))
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({one_line(error)}); name another folder") from error
            except Exception as error:  # an operator that the format does not have
                raise UserError(f"format={form}: cannot express this model ({one_line(error)})") from error
            if int8:
                from amod.quantise import quantise

                quantise(new, form, images)
            session = open_session(new, form)
            agreement = compare(exported, session, images, strict=not int8)
            if dynamic:
                rows, columns = model.patch_embed.patch_size
                larger = (size[0], size[1] + rows, size[2] + 2 * columns)
                compare(exported, session, torch.randn(sum(CHECKED), *larger, generator=generator), strict=not int8)
            del session
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == new.name)  # OpenVINO's are two
            with writable(f"{path}"):
                if len(files) > 1:  # the old one must not be read with the weights of the new
                    (path.parent / new.name).unlink(missing_ok=True)
                for file in files:
                    shutil.move(file, path.parent / file.name)
    return agreement


def check(model: Any, path: Path, form: str, int8: bool, images: Tensor | None) -> None:
    with reachable(f"{path}"):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
    if hasattr(model, "_orig_mod"):
        raise UserError("export: the model is compiled; export the one that was given to torch.compile")
    if not isinstance(model, nn.Module) or not hasattr(model, "patch_embed"):
        raise UserError(f"{type(model).__name__}: is no model of amod.convert or of timm's transformers")
    random = [i for i, entry in plan_of(model).items() if isinstance(entry, Route) and entry.router == "random"]
    if random:
        raise UserError(
            f"plan: block {random[0]} has router=random, which draws anew at every call, so that no file could be "
            "checked against it; export a model of another router"
        )
    if any(isinstance(entry, Halt) for entry in plan_of(model).values()):
        raise UserError(
            "plan: Halt: how many tokens are left depends on the image, which no file of these formats can follow; "
            "run the model in torch, or export one of another router"
        )
    if int8 and form == "torch":
        raise UserError("int8: torch's .pt2 has no quantiser here; choose format=onnx or openvino")
    if int8 and images is None:
        raise UserError("int8: needs images to calibrate on; give images=")
    if (dtype := dtype_of(model)) != torch.float32:
        raise UserError(f"export: the weights are {dtype}, and files are of float32; give model.float()")


def check_images(images: Any, size: Size, patch: tuple[int, int] | None) -> Tensor | None:
    """The images where the check needs them. ``patch``: of a file that takes any whole number of these."""
    check_patches("input_size", size, patch)
    if images is None:
        return None
    images = check_prepared(images, sum(CHECKED)).detach().cpu()
    if images.shape[1:] != tuple(size) and (patch is None or images.shape[1] != size[0]):
        raise UserError(
            f"images: {tuple(images.shape)}; the check needs prepared images (B, {', '.join(map(str, size))})"
        )
    check_patches("images", images.shape[1:], patch)
    return images.float()


def check_patches(name: str, size: Sequence[int], patch: tuple[int, int] | None) -> None:
    if patch is not None and (size[1] % patch[0] or size[2] % patch[1]):
        raise UserError(f"{name}: {size[1]} x {size[2]} pixels are no whole patches of {patch[0]} x {patch[1]}")


def any_size(model: Any, form: str) -> bool:
    """Whether the file takes images of any whole number of patches: timm's ``VisionTransformer`` with
    ``dynamic_img_size``, for onnx and torch (OpenVINO does not have the resampling of position embeddings). Not where
    tokens merge or are pruned, nor with rotary tables: torch.export ties their numbers to those of the traced image.
    """
    fixed = [entry for entry in plan_of(model).values() if isinstance(entry, Merge | Prune | Predict)]
    return isinstance(model, VisionTransformer) and model.dynamic_img_size and form != "openvino" and not fixed


def traced(exported: Exported, size: Size, dynamic: bool = False) -> Any:
    """The graph of torch.export, whose operators every runtime here knows."""
    shapes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic:
        rows, columns = exported.model.patch_embed.patch_size  # type: ignore[union-attr, misc]
        shapes |= {2: rows * torch.export.Dim("rows", min=2), 3: columns * torch.export.Dim("columns", min=2)}
    try:
        with torch.no_grad():
            return torch.export.export(exported, (torch.randn(TRACED, *size),), dynamic_shapes=(shapes,))
    except Exception as error:  # whatever in the model torch.export cannot follow
        raise UserError(
            f"{type(exported.model).__name__}: torch.export cannot follow it ({one_line(error)})"
        ) from error


def metadata(model: Any, size: Size, dynamic: bool = False) -> dict[str, Any]:
    """What a program must know to use the file."""
    data = resolve_model_data_config(model)
    return {
        "input_size": list(size),
        "any_size": dynamic,
        **{key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "class_names": class_names_of(model),
        "plan": as_data(plan_of(model)),
    }


# --- files --------------------------------------------------------------------------------------------------------


def _write_torch(program: Any, path: Path, names: Sequence[str], facts: Mapping[str, Any]) -> None:
    torch.export.save(program, path, extra_files={"amod.json": json.dumps({**facts, "outputs": names})})


def _write_onnx(program: Any, path: Path, names: Sequence[str], facts: Mapping[str, Any]) -> None:
    made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=[*names], verbose=False)
    assert made is not None
    import onnx_ir

    images = made.model.graph.inputs[0]
    assert images.shape is not None
    images.shape = onnx_ir.Shape(["batch", *images.shape.dims[1:]])
    made.model.metadata_props["amod"] = json.dumps(facts)
    made.save(path, external_data=False)


def _write_openvino(program: Any, path: Path, names: Sequence[str], facts: Mapping[str, Any]) -> None:
    import openvino

    made = openvino.convert_model(program)
    made.inputs[0].get_tensor().set_names({"images"})
    made.reshape({"images": openvino.PartialShape([-1, *facts["input_size"]])})
    for output, name in zip(made.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    made.set_rt_info(json.dumps(facts), ["amod"])
    openvino.save_model(made, path, compress_to_fp16=False)


WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "openvino": _write_openvino}


# --- the check ----------------------------------------------------------------------------------------------------


TOLERANCE, TIE = 1e-3, 1e-4
"""Logits may differ by so much of the largest; scores by so much of an image's median score are equal but for rounding,
which of their tokens is kept may then go either way."""


@torch.no_grad()
def compare(exported: Exported, session: Session, images: Tensor, strict: bool) -> Agreement:
    """Both on the images, in batches of 1 and 3. ``strict``: what is not rounding is an error.

    The blocks must keep the same tokens, and the logits be the same. Where a tie went the other way, nothing is asked
    of the image's later blocks and logits; but not every image may be such a one.
    """
    found: list[tuple[Tensor, ...]] = []
    tokens = differ = at = 0
    while at < len(images):
        batch = images[at : at + CHECKED[len(found) % 2]]
        at += len(batch)
        (logits, routing), out = exported.walk(batch), [torch.as_tensor(one) for one in session(batch.numpy())]
        if [one.shape for one in out] != [logits.shape, *(layer.indices.shape for layer in routing)]:
            raise UserError(f"the exported file gives {[tuple(one.shape) for one in out]} for {len(batch)} images")
        swapped = unlike = torch.zeros(len(batch), dtype=torch.bool)
        for layer, indices in zip(routing, out[1:], strict=True):
            scores = layer.scores
            ours, theirs = (torch.zeros_like(scores).scatter(1, kept, 1) > 0 for kept in (layer.indices, indices))
            odd = ours ^ theirs
            apart = scores.masked_fill(~odd, -torch.inf).amax(dim=1) - scores.masked_fill(~odd, torch.inf).amin(dim=1)
            unlike = unlike | odd.any(dim=1) & ~swapped & ~(apart <= TIE * scores.abs().median(dim=1).values)
            swapped = swapped | odd.any(dim=1)
            tokens += layer.indices.numel()
            differ += int((ours & ~theirs).sum())
        ours, theirs = logits.flatten(1), out[0].flatten(1)  # all tokens, of a model that pools none
        gap, same = (ours - theirs).abs().amax(dim=1), ours.argmax(dim=1) == theirs.argmax(dim=1)
        found.append((gap, ours.abs().amax(dim=1), same, swapped, unlike))
    gap, top, same, swapped, unlike = (torch.cat(column) for column in zip(*found, strict=True))
    scale = top.max().item()
    top1 = same.double().mean().item() if logits[0].numel() > 1 else None
    agreement = Agreement(len(images), gap.max().item(), scale, tokens, differ, top1)
    close = gap <= TOLERANCE * max(scale, 1.0)  # not of NaN
    if strict and (unlike.any() or swapped.all() or not (close | swapped).all()):
        raise UserError(f"the exported file does not give what the model gives ({agreement}): no file was left")
    return agreement
