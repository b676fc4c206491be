"""Batches. Every random number of a sample is a function of (seed, epoch, sample): no state needs saving.

The sampler yields keys (epoch, position). Whoever draws the sample, a worker or the main process, seeds the
three generators that transforms use from the key and puts them back afterwards. A run can therefore go on
in the middle of an epoch, with any number of workers, by leaving out the first batches.

With Lightning: ``Trainer(use_distributed_sampler=False)``, the sharding is done here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from amod.errors import UserError, one_line
from amod.image_files import open_rgb
from amod.training.config import Data
from amod.training.data import check_data
from amod.training.images import kept_rng, transforms
from amod.training.record import record_of
from amod.training.sources import load
from amod.training.splits import Split

Key = tuple[int, int]  # (epoch, position in the split)
log = logging.getLogger(__name__)


def mix(*key: int) -> int:
    """32 well-mixed bits that depend on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


class Samples(Dataset):
    """Draws whole batches: ``__getitems__`` maps keys to (images, labels, indices) and skipped files.

    A UserError is returned, not raised: torch would wrap what a worker raises into a page of traceback.
    ``refill`` keeps the batch size when files are skipped (Mixup needs an even batch) by repeating others.
    """

    upright = True
    """Whether images are turned as their EXIF data say."""

    def __init__(self, split: Split, transform: Any, seed: int | None, skip: bool, refill: bool) -> None:
        self.split, self.transform, self.seed, self.skip, self.refill = split, transform, seed, skip, refill

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, Any, int]:
        """(image (3, H, W), label, index in the source) of one key."""
        epoch, position = key
        index = int(self.split.indices[position])
        image = self._open(index)
        if self.seed is not None:
            seed = mix(self.seed, epoch, index)
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
        return (*self.prepared(image, index), index)

    def prepared(self, image: Image.Image, index: int) -> tuple[torch.Tensor, Any]:
        """(image (3, H, W), what is to be learnt of it)."""
        return self.transform(image), int(self.split.source.labels[index])

    def drawn(self, most: int, seed: int) -> np.ndarray:
        """Positions of at most so many samples, without a look at their labels."""
        return np.random.RandomState(seed).permutation(len(self))[:most]

    def stacked(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Those images (B, 3, H, W) and their labels (B,)."""
        found = [self[0, position] for position in positions.tolist()]
        return torch.stack([image for image, _, _ in found]), torch.tensor([label for _, label, _ in found])

    def __getitems__(self, keys: Sequence[Key]) -> UserError | tuple[list[Any], list[str]]:
        samples, skipped = [], []
        with kept_rng():
            for key in keys:
                try:
                    samples.append(self[key])
                except UserError as error:
                    if not self.skip:
                        return UserError(f"{error}; data.on_error=skip leaves such images out")
                    skipped.append(str(error))
        if self.refill:
            if not samples:
                return UserError(f"no image of a batch of {len(keys)} can be read; the first: {skipped[0]}")
            samples += [samples[i % len(samples)] for i in range(len(keys) - len(samples))]
        return samples, skipped

    def _open(self, index: int) -> Image.Image:
        images = self.split.source.images
        if isinstance(images, np.ndarray):
            return Image.fromarray(images[index]).convert("RGB")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return open_rgb(images[index], self.upright)
        except Exception as error:  # PIL's plugins raise whatever the bytes lead to
            raise UserError(f"{images[index]}: cannot be read ({one_line(error)})") from error


def collate(batch: UserError | tuple[list[Any], list[str]], join: Callable[[list[Any]], Any] = default_collate) -> Any:
    if isinstance(batch, UserError):
        return batch
    samples, skipped = batch
    return tuple(join(samples)) if samples else None, skipped


def outlive_signals(worker: int) -> None:
    """A batch system or a terminal signals all processes of a run. Workers go on until it has saved and ends them."""
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():  # type: ignore[union-attr]
        pass
    os._exit(0)


class Loader(DataLoader):
    """Yields (images, labels, indices); raises the workers' UserErrors here; counts what this pass skipped."""

    skipped = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # type: ignore[override]
        self.skipped, first, empty = 0, "", True
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                self._iterator = None  # ends the workers; left to the garbage collector they take 5 s
                raise batch
            batch, skipped = batch
            if skipped:
                self.skipped, first = self.skipped + len(skipped), first or skipped[0]
                log.warning("%d unreadable images skipped in this pass; the first: %s", self.skipped, first)
            if batch is not None:
                empty = False
                yield batch
        if empty and first:
            raise UserError(f"none of {self.skipped} images can be read; the first: {first}")


class EpochSampler(Sampler[Key]):
    """One rank's keys of one epoch in an order drawn from (seed, epoch), without the first ``start`` of them.

    Step k of all ranks together holds the same samples as step k of one process with the same global batch. ``fixed``:
    every epoch has the first one's order (overfit_batches: the same images again and again).
    """

    def __init__(self, size: int, seed: int, rank: int, world_size: int, fixed: bool = False) -> None:
        self.size, self.seed, self.rank, self.world_size, self.fixed = size, seed, rank, world_size, fixed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Of the whole epoch, ``start`` or not; the same on every rank."""
        return self.size // self.world_size

    def __iter__(self) -> Iterator[Key]:
        order = np.random.RandomState(mix(self.seed, 0 if self.fixed else self.epoch)).permutation(self.size)
        share = order[self.rank : len(self) * self.world_size : self.world_size][self.start :]
        return iter([(self.epoch, position) for position in share.tolist()])


class TrainLoader(Loader):
    """A loader whose state is (epoch, samples given out); Lightning saves and restores it with a checkpoint.

    Iteration starts lazily, at the first ``next``: by then Lightning has restored the state and set the epoch.
    Setting another epoch than the restored one starts that epoch from its beginning.
    """

    @property
    def keys(self) -> EpochSampler:
        return self.batch_sampler.sampler  # type: ignore[union-attr, return-value]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            self.keys.start += len(batch[-1])
            yield batch
        self.keys.start = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.keys.epoch, "start": self.keys.start}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.keys.epoch, self.keys.start = state["epoch"], state["start"]


class DataModule(LightningDataModule):
    """Train, val and test loaders over three splits, sharded over the trainer's processes; a subclass has ``samples``.

    Training drops the last, smaller batch of an epoch unless it is the only one. Evaluation splits exactly:
    rank r gets samples r, r + world, ..., none twice, so ranks may differ by one sample.
    """

    unit = "images"
    join: Callable[[Any], Any] = staticmethod(default_collate)
    """A batch's parts from its samples; the last are the indices (B,)."""

    def __init__(self, cfg: Data, splits: Mapping[str, Any], batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        self.splits, self.seed = dict(splits), seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.skip = cfg.num_workers, cfg.on_error == "skip"

    @property
    def class_names(self) -> list[str]:
        return []

    def samples(self, key: str, train: bool) -> Dataset:
        """What draws whole batches of a split, as ``Samples`` does."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """data.json: what the run folder keeps of the data."""
        raise NotImplementedError

    @property
    def sizes(self) -> dict[str, int]:
        return {key: len(split) for key, split in self.splits.items()}

    def train_dataloader(self) -> TrainLoader:
        split = self.splits["train"]
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = EpochSampler(len(split), self.seed, *self._share("train"), fixed=overfits)
        batches = BatchSampler(cast(Any, sampler), self.batch_size, drop_last=len(sampler) >= self.batch_size)
        return TrainLoader(self.samples("train", train=True), batch_sampler=batches, **self._options())

    def val_dataloader(self) -> Loader:
        return self._eval_loader("val")

    def test_dataloader(self) -> Loader:
        return self._eval_loader("test")

    def _eval_loader(self, key: str) -> Loader:
        rank, world = self._share(key)
        keys = [(0, position) for position in range(rank, len(self.splits[key]), world)]
        batches = BatchSampler(cast(Any, keys), self.eval_batch_size, False)
        return Loader(self.samples(key, train=False), batch_sampler=batches, **self._options())

    def _share(self, key: str) -> tuple[int, int]:
        """(rank, number of processes) for a split of which each gets an image; UserError in all of them otherwise."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.sizes[key] < world:
            larger = "" if key == "train" else f", or a larger data.{key}_fraction where the split is made by it"
            these = f"{self.sizes[key]} {key} {self.unit}"
            raise UserError(f"trainer.devices: {world} processes cannot share the {these}; use fewer{larger}")
        return rank, world

    def _options(self) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(8, cores // (self.trainer.num_devices if self.trainer else 1))
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": partial(collate, join=self.join),
            "worker_init_fn": outlive_signals,
            "generator": torch.Generator(),  # the loader draws a base seed; not from the model's generator
        }


class ImageData(DataModule):
    """Images and their labels, as timm prepares them for a model."""

    def __init__(
        self,
        cfg: Data,
        splits: Mapping[str, Split],
        input_cfg: Mapping[str, Any],
        augment: Mapping[str, Any],
        batch_size: int,
        eval_batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(cfg, splits, batch_size, eval_batch_size, seed)
        self.train_transform, self.eval_transform = transforms(input_cfg, augment, cfg.crop_pct)

    @property
    def class_names(self) -> list[str]:
        return next(iter(self.splits.values())).source.classes

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def samples(self, key: str, train: bool) -> Samples:
        if train:
            return Samples(self.splits[key], self.train_transform, self.seed, self.skip, refill=True)
        return Samples(self.splits[key], self.eval_transform, None, self.skip, refill=False)

    def record(self) -> dict[str, Any]:
        return record_of(self.splits)


def build_datamodule(
    cfg: Data,
    input_cfg: Mapping[str, Any],
    augment: Mapping[str, Any] | None,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    classes: Sequence[str] | None = None,
) -> ImageData:
    """Read the data set and make its loaders.

    ``input_cfg`` is timm's ``resolve_model_data_config`` (input_size, mean, std, interpolation, crop_pct) and
    ``augment`` holds arguments of timm's ``create_transform``. Batch sizes are per process. ``classes``: what the
    labels stand for (of a trained model). Raises UserError.
    """
    check_data(cfg)
    return ImageData(cfg, load(cfg, classes), input_cfg, augment or {}, batch_size, eval_batch_size, seed)
