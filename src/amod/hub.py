"""Save a routed model with its plan, load it again, share it: timm's own folder, and what timm does not know beside it.

A model of transformers' saves itself, as ever, its plan in its config.

A folder holds timm's ``model.safetensors`` (timm's keys) and ``config.json``, whose entry ``amod`` has the plan, a
``routers.safetensors`` where routers have weights, and a model card. timm itself reads it as the dense model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from timm.models._hub import generate_readme, save_for_hf
from torch import Tensor, nn

from amod.dress import of_transformers, served_by
from amod.errors import UserError, misfits, one_line, reachable, writable
from amod.files import CARD, CONFIG, ROUTERS, WEIGHTS, check_model_folder, check_place
from amod.plan import as_data, from_data
from amod.timm_models import RoutedViT
from amod.vit import convert, dense

OF_TRANSFORMERS = ("generation_config.json", f"{WEIGHTS}.index.json", "model-*.safetensors")
"""What its models have beside the files of others: where generation ends, and the parts of large files."""
FORMAT = 1
"""Of the entry ``amod`` in config.json; a library reads its own format and older ones."""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    class_names: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model into ``folder``; :func:`from_pretrained` gives it back, in float32 as timm makes models, and
    ``timm.create_model`` the dense one.

    Args:
        model: a model of :func:`amod.convert`, or a timm model; or of transformers', which ``from_pretrained`` of its
            class reads as the dense one.
        class_names: one per class; by default those that the model was loaded with.
        training: what is known of its training, for the card: plain values by name.
    """
    folder = Path(folder)
    check_model_folder(folder)
    if isinstance(class_names, str):
        raise UserError(f"class_names={class_names!r}: must be a list of names, one per class")
    if of_transformers(model):  # its config has the plan
        if class_names is not None or training:
            raise UserError(
                "class_names, training: are of timm's models; transformers keeps names in model.config.id2label"
            )
        config: Any = model.config
        check_place(folder)
        with writable(f"{folder}"):
            served_by(config.model_type, type(model).__name__).save_pretrained(model, folder)
        return folder
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("architecture"):
        raise UserError(
            f"{type(model).__name__}: timm does not know this model by a name; make it by timm.create_model"
        )
    names = class_names_of(model) if class_names is None else [*class_names]
    if names is not None and len(names) != model.num_classes:
        raise UserError(
            f"class_names: {len(names)} names for a model of {model.num_classes} classes; give one for each"
        )
    plan = model.plan if isinstance(model, RoutedViT) else {}
    learned = dict(training or {})
    ours = {"format": FORMAT, "version": _version(), "plan": as_data(plan), "training": learned}
    plain: Any = dense(model) if isinstance(model, RoutedViT) else model
    check_place(folder)
    place = folder if folder.exists() else folder.parent  # of the same disk, which a link or a mount need not share
    with tempfile.TemporaryDirectory(dir=place, prefix=".amod-") as made:
        new = Path(made)
        config = {"amod": ours, **({"label_names": names} if names else {})}
        try:
            save_for_hf(
                plain, made, model_config=config, model_args={"depth": len(plain.blocks)}, safe_serialization=True
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{folder}: timm cannot describe this model ({one_line(error)})") from error
        routers = _routers(model)
        if routers:
            save_file(routers, new / ROUTERS)
        (new / CARD).write_text(model_card(plain, plan, learned, folder.name), encoding="utf-8")
        from_pretrained(new)  # what cannot be read again is not called saved
        with writable(f"{folder}"):
            folder.mkdir(exist_ok=True)
            for name in (CONFIG, ROUTERS):  # without a config it is no model, until all of the new one is there
                (folder / name).unlink(missing_ok=True)
            for file in sorted(new.iterdir(), key=lambda file: file.name == CONFIG):
                file.replace(folder / file.name)
    return folder


def class_names_of(model: Any) -> list[str] | None:
    """The names that a timm model was loaded with; None: there are none, or its head is another one by now."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    return [*names] if names and len(names) == model.num_classes else None


def from_pretrained(source: str | Path) -> Any:
    """The model of a folder of :func:`save_pretrained`, of a hub id (``name/model``), or of a finished run's folder.

    In evaluation mode. Nothing is unpickled. Raises UserError where the files are not of that model.
    """
    folder = Path(source)
    with reachable(f"{source}"):
        if (folder / "config.yaml").is_file():
            return _from_run(folder)
        if not folder.is_dir():
            folder = _fetched(str(source))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        ours, hub = config.get("amod", {}), "model_type" in config
        found, form = None if hub else config["architecture"], ours.get("format", 1)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}: no saved model (config.json: {one_line(error)}); name a folder of save_pretrained, a hub id "
            "or a finished run"
        ) from None
    if not isinstance(form, int) or form > FORMAT:
        raise UserError(
            f"{source}: its plan is of format {form}, saved by amod {ours.get('version')}; this is amod {_version()}, "
            f"which reads up to format {FORMAT}: install a newer amod"
        )
    if hub:
        return served_by(config["model_type"], source).from_pretrained(folder, config)
    if not (folder / WEIGHTS).is_file():
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
        hint = (
            f"; {pickled[0]} is a pickle, which may run code and is not read: save it as safetensors" if pickled else ""
        )
        raise UserError(f"{source}: no {WEIGHTS}{hint}")
    try:
        vit: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:  # whatever timm and torch make of the names and arguments
        raise UserError(f"{source}: timm {timm.__version__} cannot make its {found} ({one_line(error)})") from error
    model = convert(vit, plan=from_data(ours["plan"])) if ours.get("plan") else vit
    state = _read(folder / WEIGHTS)
    if (folder / ROUTERS).is_file():
        state |= _read(folder / ROUTERS)
    load_exactly(model, state, f"{folder / WEIGHTS}: is not of the {found} with the plan that its config.json names")
    return model.eval()


def push_to_hub(
    model: nn.Module, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None,
    class_names: Sequence[str] | None = None, training: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """:func:`save_pretrained` into a repository of the Hugging Face hub, made if it is not there; its commit."""
    api = HfApi(token=token, library_name="amod", library_version=_version())
    with tempfile.TemporaryDirectory() as made:
        folder = save_pretrained(model, Path(made) / repo_id.rpartition("/")[2], class_names, training)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message="Add model"
            )
        except Exception as error:  # no network, no right to write, an impossible name: whatever the client raises
            raise UserError(f"{repo_id}: cannot be pushed ({one_line(error)}); log in with `hf auth login`") from error


def model_card(model: Any, plan: Mapping[int, Any], training: Mapping[str, Any], name: str) -> str:
    blocks = "\n".join(f"    {i}: {entry}" for i, entry in sorted(plan.items())) or "    (dense)"
    usage = (
        f"```python\nimport amod, timm\n\nmodel = amod.from_pretrained({name!r})  # the routed model\n"
        f'dense = timm.create_model("local-dir:{name}", pretrained=True)  # every token in every block\n```\n'
    )
    details: dict[str, Any] = {"Architecture": model.pretrained_cfg["architecture"], "Classes": model.num_classes}
    details |= {f"Training, {key}": value for key, value in training.items()}
    card = {
        "tags": ["image-classification", "timm", "amod"],
        "license": model.pretrained_cfg.get("license") or "unknown",
        "description": f"What each block does with its tokens (those not listed process all):\n\n{blocks}\n",
        "details": details,
        "usage": usage,
    }
    return generate_readme(card, name)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], wrong: str) -> None:
    """Load a state dict that has just this model's keys and shapes, or raise a UserError that begins with ``wrong``."""
    problems = misfits(model.state_dict(), state)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{wrong}: {', '.join(problems[:3])}{more}")
    model.load_state_dict(state)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # whatever the bytes make the reader raise
        raise UserError(f"{file}: cannot be read as safetensors ({one_line(error)})") from error


def _fetched(repo: str) -> Path:
    """The folder of a hub id in the hub's cache, fetched if it is not there."""
    try:
        return Path(snapshot_download(repo, allow_patterns=[WEIGHTS, ROUTERS, CONFIG, *OF_TRANSFORMERS]))
    except Exception as error:  # no such place, no network, a name that no hub allows
        raise UserError(f"{repo}: no such folder, and the hub gives no such model ({one_line(error)})") from error


def _from_run(folder: Path) -> Any:
    from amod.training.finished import classes_in, load_model, weights_of
    from amod.training.folder import read_config

    run = read_config(folder / "config.yaml")
    if run.model.task == "detection":
        from amod.training import detecting

        return detecting.load_model(folder, run)
    if run.model.task == "language":
        from amod.training import language

        return language.load_model(folder, run)
    model: Any = load_model(folder, run, classes_in(weights_of(folder)))
    prepared_as(model, folder)
    return model


def prepared_as(model: Any, source: Path) -> None:
    """Have the model know its classes' names and how a run prepared images for it, as far as its weights' file does."""
    from amod.training.folder import read_config
    from amod.training.weights import head_classes

    run = read_config(source / "config.yaml") if (source / "config.yaml").is_file() else None
    known = {"label_names": head_classes(source), "crop_pct": run and run.data.crop_pct}
    model.pretrained_cfg = {**model.pretrained_cfg, **{name: value for name, value in known.items() if value}}


def classes_in(state: Mapping[str, Tensor]) -> int:
    """How many classes the head of a state dict has; 0: it has none."""
    from amod.training.weights import HEADS

    return next((len(state[key]) for key in HEADS if key in state), 0)


def head_size(state: Mapping[str, Tensor], source: Any) -> int:
    """As :func:`classes_in`, of a state dict that must have a head."""
    if not (classes := classes_in(state)):
        raise UserError(f"{source}: these weights have no head, so nothing says how many classes it has")
    return classes


def _routers(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in model.state_dict().items() if key.startswith("routers.")}


def _version() -> str | None:
    try:
        return version("amod")
    except PackageNotFoundError:
        return None
