"""model.task=language: causal language models of transformers on folders of .txt files. A file of a task, see
``tasks.py``. Axes: B samples, N tokens of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from transformers.utils import GENERATION_CONFIG_NAME

from amod.errors import UserError, one_line, writable
from amod.flops import count_flops
from amod.gates import is_gated, penalty, share_kept
from amod.training.config import Data, TrainConfig, Variant
from amod.training.data import locate
from amod.training.finished import weights_of, with_weights
from amod.training.loaders import DataModule, Key, Samples
from amod.training.module import Batch, TaskModule
from amod.training.record import read_record, say_origin
from amod.training.splits import draw_of
from amod.training.tasks import LANGUAGE
from amod.training.variants import gates_of
from amod.training.weights import Built
from amod.vit import convert, dense

END = "<|endoftext|>"
KEPT = "base"
"""The folder in a run's that has the config and the tokenizer of its model."""


class LanguageModel(TaskModule):
    """``model(ids)``. A batch is token ids (B, N) and indices (B,); the loss is of every token but the first."""

    task = LANGUAGE

    def own_metrics(self) -> dict[str, Metric]:
        return {}

    def loss(self, batch: Batch) -> Tensor:
        ids = batch[0]
        if not is_gated(self.model):
            return next_token_loss(self.model(ids, use_cache=False).logits, ids)
        out, routing = self.model(ids, use_cache=False, return_routing=True)
        return next_token_loss(out.logits, ids) + penalty(routing, cast(Any, self.model).plan)

    def measure(self, metrics: Any, batch: Batch) -> tuple[Tensor, None]:
        return next_token_loss(self.evaluated(batch[0], use_cache=False).logits, batch[0]), None

    def values(self, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**computed, "perplexity": computed["loss"].exp()}


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats per token: (B, N, words), (B, N)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


# --- texts --------------------------------------------------------------------------------------------------------


class Pieces(Dataset):
    """Rows (n, N) of token ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[list[Any], list[str]]:
        return [(torch.from_numpy(self.ids[at]), at) for _, at in keys], []


class TextData(DataModule):
    unit = LANGUAGE.samples

    def samples(self, key: str, train: bool) -> Samples:
        return cast(Samples, Pieces(self.splits[key]))

    def record(self) -> dict[str, Any]:
        def about(ids: np.ndarray) -> dict[str, Any]:
            return {self.unit: len(ids), "fingerprint": hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()}

        return {"classes": [], "splits": {key: about(ids) for key, ids in self.splits.items()}}


def texts_of(cfg: Data) -> dict[str, str]:
    """{name: text} of all files, ended by END or the end of a file; UserError for one that cannot be read."""
    root = locate(cfg)
    found: dict[str, str] = {}
    for file in sorted(root.rglob("*.txt")):
        try:
            parts = file.read_text(encoding="utf-8").split(END)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text ({one_line(error)})") from None
        found |= {f"{file.relative_to(root)}:{i}": text.strip() for i, text in enumerate(parts) if text.strip()}
    return found


def pieces(cfg: Data, tokenizer: Any) -> dict[str, np.ndarray]:
    """The samples (n, N) int64 of train, val and test."""
    if cfg.bos and tokenizer.bos_token_id is None:
        raise UserError("data.bos=true: this model's tokenizer has no beginning token; leave it out")
    streams: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for name, text in texts_of(cfg).items():
        draw = draw_of(f"{cfg.split_seed}/{name}")
        rest = 1 - cfg.test_fraction
        split = "test" if draw >= rest else "val" if draw >= rest * (1 - cfg.val_fraction) else "train"
        streams[split] += tokenizer(text)["input_ids"]
    rows = {key: cut(ids, cfg.length, tokenizer.bos_token_id if cfg.bos else None) for key, ids in streams.items()}
    if empty := [key for key, ids in rows.items() if not len(ids)]:
        raise UserError(
            f"data.root={cfg.root}: has too little text, none of {cfg.length} tokens is left for {empty[0]}; give more "
            "texts (files, or parts ended by a line <|endoftext|>), or a smaller data.length"
        )
    return rows


def cut(ids: list[int], length: int, bos: int | None) -> np.ndarray:
    """(n, length) int64: pieces one behind the other, without the rest; with ``bos`` each begins with it."""
    rows, at = [], 0
    while at < len(ids):
        begin = [] if bos is None or ids[at] == bos else [bos]
        end = at + length - len(begin)
        if end <= len(ids):
            rows.append(begin + ids[at:end])
        at = end
    return np.array(rows, np.int64).reshape(-1, length)


def read(cfg: TrainConfig, run: Path | None = None) -> TextData:
    schedule, splits = cfg.schedule, pieces(cfg.data, opened(transformers.AutoTokenizer, cfg, run))
    return TextData(cfg.data, splits, schedule.batch_size, schedule.eval_batch_size, cfg.seed)


# --- the model ----------------------------------------------------------------------------------------------------


def opened(kind: Any, cfg: Variant, run: Path | None = None, **given: Any) -> Any:
    """transformers' model, config or tokenizer: of what a run's folder keeps, or of the folder ``model.name``."""
    place = cfg.model.name
    if run is not None and (run / KEPT).is_dir():  # runs of before it was kept have model.name alone
        place = str(run / KEPT)
    try:
        return kind.from_pretrained(place, local_files_only=True, **given)
    except Exception as error:  # whatever transformers makes of the files
        raise UserError(
            f"model.name={place}: transformers reads no {kind.__name__} there ({one_line(error)})"
        ) from error


def build(cfg: Variant, data: Any) -> Built:
    model = opened(transformers.AutoModelForCausalLM, cfg, use_safetensors=True, dtype=torch.float32)
    return Built(gated(model, cfg), True)


def gated(model: Any, cfg: Variant) -> Any:
    if cfg.router.name != "tuning":
        return model
    return convert(model, router="tuning", layers=cfg.router.layers, **gates_of(cfg.router))


def keep(cfg: TrainConfig, folder: Path) -> None:
    """The model's config and tokenizer, so that the run is read without the folder ``model.name``."""
    kinds: list[Any] = [transformers.AutoTokenizer, transformers.AutoConfig]
    if (Path(cfg.model.name) / GENERATION_CONFIG_NAME).is_file():
        kinds.append(transformers.GenerationConfig)
    with writable(f"{folder}"):
        for kind in kinds:
            opened(kind, cfg).save_pretrained(folder / KEPT)


def module(model: nn.Module, cfg: TrainConfig, data: TextData) -> LanguageModel:
    return LanguageModel(model, cfg.schedule, cfg.seed)


def cost(model: nn.Module, cfg: Variant) -> dict[str, Any]:
    """What a sample costs; with gates, until they are measured, as if all were open."""
    lm: Any = dense(model) if is_gated(model) else model
    return {
        "router": cfg.router.name,
        "tokens": cfg.data.length,
        "blocks_routed": [*getattr(model, "blocks_routed", ())],
        "depth": lm.config.num_hidden_layers,
        "gflops": count_flops(lm, cfg.data.length) / 1e9,
        "params": sum(p.numel() for p in model.parameters()),
    }


def measured(model: nn.Module, data: TextData) -> dict[str, Any]:
    """Of a model with gates: the share kept on up to 64 test samples, and the GFLOPs on 8 of them."""
    if not is_gated(model):
        return {}
    ids = torch.from_numpy(data.splits["test"][:64]).to(next(model.parameters()).device)
    model.eval()
    with torch.no_grad():
        passes = [  # logits of the last token alone: those of all, with a large vocabulary, take gigabytes
            model(some, use_cache=False, return_routing=True, logits_to_keep=1)[1]
            for some in ids.split(data.eval_batch_size)
        ]
    return {**share_kept(passes), "gflops": count_flops(model, ids[:8]) / 1e9}


def load_measured(folder: Path, cfg: TrainConfig, split: str) -> tuple[nn.Module, TextData]:
    """The model, and the texts of ``split`` as the test texts of a data module."""
    weights_of(folder)
    data = read(cfg, folder)
    say_origin(split, data.record()["splits"]["train" if split == "all" else split], read_record(folder))
    data.splits["test"] = np.concatenate([*data.splits.values()]) if split == "all" else data.splits[split]
    return load_model(folder, cfg), data


def load_model(folder: Path, run: TrainConfig) -> nn.Module:
    """The model of a finished run, with the best epoch's weights, in evaluation mode."""
    weights_of(folder)
    config = opened(transformers.AutoConfig, run, folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (folder / KEPT / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = opened(transformers.GenerationConfig, run, folder)
    return with_weights(gated(model, run), folder)
