"""Every set is read in its true format, splits are fixed, order and augmentation depend on the key alone."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat

import fakes
from amod.errors import UserError
from amod.image_files import open_rgb
from amod.training.config import Data, Group
from amod.training.data import LAYOUTS, check_data
from amod.training.images import kept_rng
from amod.training.loaders import EpochSampler, build_datamodule
from amod.training.rules import parse
from amod.training.sources import aligned
from amod.training.splits import Source, Split, draw_of

CONF = Path(__file__).parents[2] / "conf" / "data"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
INPUT = {
    "input_size": (3, 28, 28),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
AUGMENT = {"scale": [0.5, 1.0], "ratio": [0.8, 1.25], "hflip": 0.5, "color_jitter": 0.4, "re_prob": 0.5}
AUGMENT |= {"auto_augment": "rand-m9-mstd0.5-inc1", "re_mode": "pixel"}


def config(name: str, /, **values) -> Data:
    local = {"download": False} if name == "fashion_mnist" else {}
    cfg = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), {"num_workers": 0, **local, **values})
    return parse(Composed, {"data": OmegaConf.to_container(cfg, resolve=True)}).data


class Composed(Group):
    data: Data


def build(name: str, augment=None, batch_size=32, seed=0, **values):
    return build_datamodule(config(name, **values), INPUT, augment, batch_size, batch_size, seed)


def epoch(loader, number=0) -> list[tuple[torch.Tensor, ...]]:
    loader.keys.set_epoch(number)
    return list(loader)


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- the sets -----------------------------------------------------------------------------------------------------

SETS = {
    # name: (how to write a small one, config, sizes, classes)
    "flowers": (fakes.flowers, {}, (102, 102, 102), 102),
    "cars": (fakes.cars, {"val_fraction": 0.5}, (196, 196, 196), 196),
    "pets": (fakes.pets, {"val_fraction": 0.5}, (37, 37, 37), 37),
    "fashion_mnist": (fakes.fashion_mnist, {}, (180, 20, 50), 10),
    "imagenet": (fakes.imagenet, {"num_classes": 4, "val_fraction": 0.1}, (33, 7, 8), 4),
    "imagenette": (
        lambda root: fakes.imagenette(root / "imagenette2-320"),
        {"num_classes": 3, "val_fraction": 0.2},
        (24, 6, 6),
        3,
    ),
    "folder": (lambda root: fakes.image_folder(root, per_class=20), {"val_fraction": 0.3}, (39, 8, 13), 3),
    "digits": (lambda root: root, {}, (1294, 144, 359), 10),
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_read_in_its_own_format(name, tmp_path, monkeypatch):
    write, values, sizes, classes = SETS[name]
    fakes.accept_fake_flowers(monkeypatch)
    write(tmp_path)
    data = build(name, root=str(tmp_path), **values)

    assert tuple(data.sizes.values()) == sizes
    assert data.num_classes == len(set(data.class_names)) == classes
    for loader, split in (
        (data.train_dataloader(), data.splits["train"]),
        (data.val_dataloader(), data.splits["val"]),
        (data.test_dataloader(), data.splits["test"]),
    ):
        images, labels, indices = next(iter(loader))
        assert images.shape[1:] == (3, 28, 28)
        assert (images.dtype, labels.dtype, indices.dtype) == (torch.float32, torch.int64, torch.int64)
        assert torch.equal(labels, torch.from_numpy(split.source.labels[indices]))
        assert len(np.unique(split.labels)) == classes or len(split) < classes


def test_the_number_of_workers_follows_the_cores(tmp_path, monkeypatch):
    data = build("folder", root=str(fakes.image_folder(tmp_path)), num_workers=None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(32), raising=False)
    assert data.train_dataloader().num_workers == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(3))
    assert data.val_dataloader().num_workers == 3


def test_every_config_has_a_layout_and_checks():
    assert {file.stem for file in CONF.glob("*.yaml")} == set(LAYOUTS)
    for name in LAYOUTS:
        assert config(name).name == name
        if LAYOUTS[name].can_download:
            check_data(config(name, download=True, root="/nowhere"))


@pytest.mark.parametrize(("train_on", "sizes"), [("train", (102, 204, 102)), ("train+val", (230, 76, 102))])
def test_flowers_labels_are_those_of_its_mat_file(tmp_path, monkeypatch, train_on, sizes):
    from scipy.io import loadmat

    fakes.accept_fake_flowers(monkeypatch)
    fakes.flowers(tmp_path, val=2)
    data = build("flowers", root=str(tmp_path), train_on=train_on, val_fraction=0.25)
    assert tuple(data.sizes.values()) == sizes
    labels = loadmat(tmp_path / "flowers-102/imagelabels.mat", squeeze_me=True)["labels"]
    for split in data.splits.values():
        for path, label in zip(split.source.images, split.source.labels, strict=True):
            assert labels[int(Path(path).stem.removeprefix("image_")) - 1] == label + 1


def test_cars_files_belong_to_their_part(tmp_path):
    data = build("cars", root=str(fakes.cars(tmp_path, classes=196)))
    assert data.class_names[3] == "Maker Model 3"
    assert all("cars_train" in path for path in data.splits["val"].source.images)
    assert all("cars_test" in path for path in data.splits["test"].source.images)


def test_imagenet_without_meta_file_is_named_by_synset(tmp_path):
    fakes.imagenet(tmp_path)
    assert build("imagenet", root=str(tmp_path), num_classes=4, val_fraction=0.1).class_names[0] == "animal 0"
    (tmp_path / "imagenet/meta.bin").unlink()
    assert build("imagenet", root=str(tmp_path), num_classes=4, val_fraction=0.1).class_names[0] == "n01440764"


def test_root_may_be_the_data_set_folder_itself(tmp_path):
    fakes.pets(tmp_path)
    check_data(config("pets", root=str(tmp_path / "oxford-iiit-pet")))


def test_folder_keeps_the_parts_it_has(tmp_path):
    fakes.image_folder(tmp_path, per_class=4, parts=("train", "val", "test"))
    data = build("folder", root=str(tmp_path))
    assert data.sizes == {"train": 12, "val": 12, "test": 12}


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_pixels(tmp_path, compressed):
    fakes.fashion_mnist(tmp_path, compressed=compressed)
    data = build("fashion_mnist", root=str(tmp_path))
    pixels = np.random.RandomState(50).randint(0, 256, (50, 28, 28), dtype=np.uint8)  # as fakes draws them
    images, labels, _ = next(iter(data.test_dataloader()))
    expected = torch.from_numpy(pixels[:32]).float()[:, None].expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(images, (expected - 0.5) / 0.5)
    assert labels.tolist() == [i % 10 for i in range(32)]


def test_noise_takes_the_place_of_black_and_of_nothing_else(tmp_path):
    fakes.fashion_mnist(tmp_path)
    black, noise, again = (
        build("fashion_mnist", root=str(tmp_path), background=background).splits["test"].source.images
        for background in ("black", "noise", "noise")
    )
    assert (black == 0).any()
    assert noise.dtype == np.uint8
    assert noise.min() > 0
    assert len(np.unique(noise[black == 0])) > 1
    assert (noise[black > 0] == black[black > 0]).all()
    assert (noise == again).all()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist():
    data = build("fashion_mnist", root="/nowhere")
    assert data.sizes == {"train": 54_000, "val": 6_000, "test": 10_000}
    assert np.bincount(data.splits["val"].labels).tolist() == [600] * 10
    images = data.splits["train"].source.images
    assert round(float(images.mean()) / 255, 4) == 0.2860  # the mean that everyone normalises by


# --- splits -------------------------------------------------------------------------------------------------------


def test_a_cut_is_stratified_disjoint_and_fixed():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    split = Split(Source([""] * 100, labels, ["a", "b", "c"]), np.arange(100))
    rest, part = split.cut(0.1, seed=0)
    assert np.bincount(part.labels).tolist() == [5, 3, 2]
    assert sorted([*rest.indices, *part.indices]) == list(range(100))
    assert part.indices.tolist() == split.cut(0.1, seed=0)[1].indices.tolist()
    assert part.indices.tolist() != split.cut(0.1, seed=1)[1].indices.tolist()


def test_splits_do_not_depend_on_the_run_seed():
    one, other = build("digits", seed=0), build("digits", seed=1)
    for key in ("train", "val", "test"):
        assert np.array_equal(one.splits[key].indices, other.splits[key].indices)
    # The first test digits, so that a library update that moved the split would be noticed.
    assert one.splits["test"].indices[:5].tolist() == [1, 14, 18, 30, 32]
    together = np.concatenate([split.indices for split in one.splits.values()])
    assert sorted(together) == list(range(1797))


# --- transforms ---------------------------------------------------------------------------------------------------


def test_without_augmentation_training_images_are_evaluation_images(tmp_path):
    data = build("folder", root=str(fakes.image_folder(tmp_path)))
    samples = data.train_dataloader().dataset
    images, _, indices = next(iter(data.train_dataloader()))
    assert torch.equal(images, torch.stack([data.eval_transform(samples._open(int(i))) for i in indices]))


def test_an_unset_augmentation_is_off(tmp_path):
    """With hflip alone, an image is itself or its mirror image; timm's default crop and jitter stay away."""
    data = build("digits", {"hflip": 0.5, "auto_augment": None})
    flipped = 0
    for images, _, indices in epoch(data.train_dataloader())[:3]:
        for image, index in zip(images, indices, strict=True):
            plain = data.eval_transform(data.train_dataloader().dataset._open(int(index)))
            flipped += torch.equal(image, plain.flip(-1))
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
    assert 0 < flipped < 96


def test_small_images_are_not_cropped_in_evaluation(tmp_path):
    fakes.fashion_mnist(tmp_path)
    whole = build("fashion_mnist", root=str(tmp_path))
    cropped = build("fashion_mnist", root=str(tmp_path), crop_pct=None)
    assert len(whole.eval_transform.transforms) == len(cropped.eval_transform.transforms)
    assert not torch.equal(next(iter(whole.test_dataloader()))[0], next(iter(cropped.test_dataloader()))[0])


def test_jitter_that_timm_leaves_out_is_said(caplog):
    build("digits", {"auto_augment": "rand-m9"})
    assert not caplog.messages
    build("digits", {"auto_augment": "rand-m9", "color_jitter": 0.4})
    assert "color_jitter=0.4: timm leaves it out beside auto_augment" in caplog.text


@pytest.mark.parametrize(
    ("augment", "named"),
    [
        ({"hflop": 0.5}, "hflop"),
        ({"auto_augment": "rnd"}, "rnd"),
        ({"re_prob": 0.5, "re_mode": "x"}, "re_mode"),
        ({"hflip": 0.5, "input_size": [3, 5, 5]}, "(3, 5, 5) is not what the model takes"),
        ({"hflip": 0.5, "normalize": False}, "uint8"),
        ({"hflip": 0.5, "separate": True}, "tuple"),
    ],
)
def test_wrong_augmentation(augment, named):
    with pytest.raises(UserError) as error:
        build("digits", augment)
    one_line(error, "schedule.augment", named)


# --- randomness and order -----------------------------------------------------------------------------------------


def test_an_epoch_is_the_same_for_any_number_of_workers_and_differs_between_epochs_and_seeds():
    zero = epoch(build("digits", AUGMENT, 256).train_dataloader(), 3)
    assert same(zero, epoch(build("digits", AUGMENT, 256, num_workers=2).train_dataloader(), 3))
    assert not same(zero, epoch(build("digits", AUGMENT, 256).train_dataloader(), 4))
    assert not same(zero, epoch(build("digits", AUGMENT, 256, seed=1).train_dataloader(), 3))
    orders = [
        epoch(build("digits", None, 256, seed=seed).train_dataloader(), e) for seed, e in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order[0][2].tolist()) for order in orders}) == 3
    indices = torch.cat([batch[2] for batch in zero])
    assert len(indices) == len(indices.unique()) == 1294 // 256 * 256


def test_augmentation_of_a_sample_does_not_depend_on_its_place_in_the_batch():
    samples = build("digits", AUGMENT).train_dataloader().dataset
    [alone], _ = samples.__getitems__([(2, 7)])
    [_, _, third], _ = samples.__getitems__([(2, 3), (2, 5), (2, 7)])
    [other], _ = samples.__getitems__([(3, 7)])
    assert torch.equal(alone[0], third[0])
    assert not torch.equal(alone[0], other[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_of_the_process_alone(workers):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    with kept_rng():
        before = draw()
    epoch(build("digits", AUGMENT, 512, num_workers=workers).train_dataloader())
    with kept_rng():
        assert draw() == before


@pytest.mark.parametrize(("workers", "done"), [(0, 1), (0, 4), (2, 4)])
def test_an_interrupted_epoch_goes_on_bit_for_bit(workers, done):
    whole = epoch(build("digits", AUGMENT, 256, num_workers=workers).train_dataloader(), 2)

    first = build("digits", AUGMENT, 256, num_workers=workers).train_dataloader()
    first.keys.set_epoch(2)
    batches = iter(first)
    start = [next(batches) for _ in range(done)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert state == {"epoch": 2, "start": done * 256}

    second = build("digits", AUGMENT, 256, num_workers=workers).train_dataloader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert len(second) == len(whole)
    assert same(start + list(second), whole)
    assert same(list(second), whole)
    assert same(epoch(second, 3), epoch(build("digits", AUGMENT, 256).train_dataloader(), 3))


class Recorder(LightningModule):
    """Notes (epoch, first indices) of each batch; nothing is learnt."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = seen

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch[2][:4].tolist()))
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


MOMENTS = {
    "mid-epoch": {"every_n_train_steps": 2},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "end of epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("limit", "workers"), [(1.0, 0), (3, 0), (3, 1)], ids=["whole", "limited", "worker"])
def test_lightning_resumes_where_it_was(tmp_path, workers, limit, moment):

    def run(seen, checkpoints=(), resume=None):
        trainer = Trainer(
            max_epochs=3,
            limit_train_batches=limit,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=bool(checkpoints),
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=list(checkpoints),
        )
        trainer.fit(Recorder(seen), build("digits", None, 256, num_workers=workers), ckpt_path=resume)

    whole: list = []
    run(whole, [ModelCheckpoint(tmp_path, save_top_k=-1, **MOMENTS[moment])])
    assert len(whole) == 3 * (5 if limit == 1.0 else 3)

    files = {int(file.stem.split("step=")[1]): file for file in tmp_path.glob("*.ckpt")}
    early, *_, late = sorted(files.keys() - {len(whole)})
    for step in (early, late):
        seen: list = []
        run(seen, resume=files[step])
        assert seen == whole[step:], step


def test_overfit_batches_draws_the_same_images_every_epoch():
    seen: list = []
    trainer = Trainer(
        max_epochs=3,
        overfit_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Recorder(seen), build("digits", None, 64))
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]
    assert len({tuple(indices) for _, _, indices in seen}) == 1


def test_ranks_share_each_step_of_one_process():
    alone = EpochSampler(23, 0, 0, 1)
    ranks = [EpochSampler(23, 0, rank, 2) for rank in range(2)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(1)
    shares = [list(sampler) for sampler in ranks]
    assert [len(share) for share in shares] == [11, 11] == [len(sampler) for sampler in ranks]
    for step in range(2):  # 5 per rank are 10 together
        together = {key for share in shares for key in share[step * 5 : step * 5 + 5]}
        assert together == set(list(alone)[step * 10 : step * 10 + 10])


def test_evaluation_shares_are_exact(monkeypatch):
    data = build("digits", batch_size=16)
    seen = []
    for rank in range(4):
        monkeypatch.setattr(data, "_share", lambda key, rank=rank: (rank, 4))
        seen += [index for batch in data.test_dataloader() for index in batch[2].tolist()]
    assert sorted(seen) == data.splits["test"].indices.tolist()
    assert len(seen) == 359


def test_the_last_batch_is_dropped_only_beside_others(tmp_path):
    assert [len(b[0]) for b in build("digits", batch_size=1000).train_dataloader()] == [1000]
    assert [len(b[0]) for b in build("digits", batch_size=5000).train_dataloader()] == [1294]


# --- wrong and broken input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"name": "flower"}, "flower"),
        ({"on_error": "ignore"}, "ignore"),
        ({"val_fraction": 0}, "data.val_fraction=0"),
        ({"val_fraction": 1.5}, "1.5"),
        ({"val_fraction": "half"}, "half"),
        ({"test_fraction": -1}, "data.test_fraction=-1"),
        ({"val_fraction": None}, "data.val_fraction=null"),
        ({"test_fraction": None}, "data.test_fraction=null"),
        ({"split_seed": None}, "data.split_seed=null"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"num_workers": 1.5}, "1.5"),
        ({"num_workers": True}, "true"),
        ({"num_classes": 1}, "data.num_classes=1"),
        ({"crop_pct": 0}, "data.crop_pct=0"),
        ({"download": True}, "cannot be downloaded"),
        ({"download": "maybe"}, "maybe"),
    ],
)
def test_wrong_values(values, named):
    with pytest.raises(UserError) as error:
        check_data(config("digits", **values))
    one_line(error, named)


def test_imagenette_is_any_folder_of_its_layout_and_has_names_for_synsets(tmp_path):
    own = fakes.imagenette(tmp_path / "my photographs", synsets=(*fakes.SYNSETS, "n99999999"))
    data = build("imagenette", root=str(own), num_classes=4)
    assert data.class_names == [*fakes.SYNSETS.values(), "n99999999"]
    assert all(f"{own}/train/" in image for image in data.splits["val"].source.images)
    assert all(f"{own}/val/" in image for image in data.splits["test"].source.images)
    comma = fakes.imagenette(tmp_path / "commas", synsets=(*fakes.SYNSETS, "tomato,red"))
    assert build("imagenette", root=str(comma), num_classes=4).class_names[-1] == "tomato,red"
    fakes.imagenette(own / "imagenette2-320", train=20)  # the set's own folder goes before
    assert build("imagenette", root=str(own), num_classes=3, val_fraction=0.5).sizes["train"] == 30


def test_imagenettes_ten_names(tmp_path):
    """As torchvision has them, from whose list the synsets are."""
    from torchvision.datasets import Imagenette

    ours = fakes.imagenette(tmp_path, synsets=tuple(Imagenette._WNID_TO_CLASS))
    names = build("imagenette", root=str(ours)).class_names
    assert names == [known[0] for known in Imagenette._WNID_TO_CLASS.values()]
    assert "church" in names


def test_imagenette_is_fetched_at_320_pixels(tmp_path, monkeypatch):
    from torchvision.datasets import Imagenette

    monkeypatch.setattr(Imagenette, "_download", lambda self: fakes.imagenette(Path(self._size_root)))
    data = build("imagenette", root=str(tmp_path / "new"), download=True, num_classes=3)
    assert "/new/imagenette2-320/val/" in data.splits["test"].source.images[0]


@pytest.mark.skipif("AMOD_PHOTOGRAPHS" not in os.environ, reason="AMOD_PHOTOGRAPHS names no folder of Imagenette")
def test_the_real_photographs():
    data = build("imagenette", root=os.environ["AMOD_PHOTOGRAPHS"], val_fraction=0.2)
    assert data.num_classes == 10
    images, labels, _ = next(iter(data.test_dataloader()))
    assert images.std() > 0.3
    assert set(labels.tolist()) == {0}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "digits"])
def test_missing_data_says_what_where_and_how(name, tmp_path):
    with pytest.raises(UserError) as error:
        check_data(config(name, root=str(tmp_path / "none"), fallback=[]))
    how = "data.download=true" if LAYOUTS[name].can_download else LAYOUTS[name].get
    one_line(error, f"data={name}", str(tmp_path / "none"), how, "data.root=FOLDER")


def move_down(folder: Path) -> None:
    """As when an archive is unpacked inside the folder of its own name."""
    inner = folder.parent / "inner"
    folder.rename(inner)
    folder.mkdir()
    inner.rename(folder / folder.name)


def flat_val(root: Path) -> None:
    for file in list((root / "imagenet/val").glob("*/*")):
        file.rename(root / "imagenet/val" / file.name)
    for folder in (root / "imagenet/val").iterdir():
        if folder.is_dir():
            folder.rmdir()


def rename(old: str, new: str):
    return lambda root: (root / old).rename(root / new)


def remove(*names: str):
    return lambda root: [shutil.rmtree(root / n) if (root / n).is_dir() else (root / n).unlink() for n in names]


def write(name: str, data: bytes):
    return lambda root: (root / name).write_bytes(data)


def flowers_label(root: Path) -> None:
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.full((1, 306), 103, dtype=np.uint8)})


def only_class(root: Path) -> None:
    for label in (1, 2):
        shutil.rmtree(root / f"class_{label}")


CARS = "stanford_cars"
BROKEN = [
    (
        "cars",
        remove(f"{CARS}/cars_test_annos_withlabels.mat"),
        [f"{CARS}/cars_test_annos_withlabels.mat missing"],
    ),
    ("cars", lambda root: move_down(root / CARS), ["found", f"{CARS}/{CARS}", "move it"]),
    (
        "cars",
        lambda root: move_down(root / CARS / "cars_train"),
        ["cars_train/*.jpg missing", "cars_train/cars_train"],
    ),
    (
        "cars",
        rename(f"{CARS}/cars_test_annos_withlabels.mat", f"{CARS}/devkit/cars_test_annos_withlabels.mat"),
        ["found", "devkit/cars_test_annos_withlabels.mat"],
    ),
    (
        "cars",
        rename(f"{CARS}/devkit/cars_test_annos.mat", f"{CARS}/cars_test_annos_withlabels.mat"),
        ["cars_test_annos_withlabels.mat", "class"],
    ),
    (
        "cars",
        write(f"{CARS}/devkit/cars_meta.mat", b"not a mat file" * 20),
        ["cars_meta.mat", "not the file"],
    ),
    ("flowers", remove("flowers-102/setid.mat"), ["flowers-102/setid.mat missing", "data.download=true"]),
    ("flowers", remove("flowers-102/jpg"), ["flowers-102/jpg/*.jpg missing"]),
    ("flowers", write("flowers-102/setid.mat", b"x" * 300), ["setid.mat", "not the file"]),
    ("flowers", write("flowers-102/imagelabels.mat", b""), ["imagelabels.mat", "not the file"]),
    ("flowers", rename("flowers-102/setid.mat", "flowers-102/imagelabels.mat"), ["setid.mat missing"]),
    ("flowers", flowers_label, ["label 102", "outside 0..101", "image_0"]),
    ("pets", remove("oxford-iiit-pet/annotations/test.txt"), ["annotations/test.txt missing"]),
    (
        "pets",
        write("oxford-iiit-pet/annotations/test.txt", b"breed_01_100 one\n"),
        ["data=pets", "oxford-iiit-pet"],
    ),
    ("pets", write("oxford-iiit-pet/annotations/test.txt", b""), ["data=pets", "oxford-iiit-pet"]),
    (
        "fashion_mnist",
        remove("FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ["t10k-labels-idx1-ubyte", "dataset-fashion-mnist"],
    ),
    (
        "fashion_mnist",
        write("FashionMNIST/raw/t10k-labels-idx1-ubyte", b"\0\0\x08\x01"),
        ["t10k-labels-idx1-ubyte"],
    ),
    (
        "fashion_mnist",
        write("FashionMNIST/raw/train-images-idx3-ubyte", b"x" * 99),
        ["train-images-idx3-ubyte"],
    ),
    (
        "fashion_mnist",  # floats, by its third byte
        write("FashionMNIST/raw/t10k-labels-idx1-ubyte", b"\0\0\x0d\x01\0\0\0\x32" + b"\0" * 50),
        ["t10k-labels-idx1-ubyte", "00000d01"],
    ),
    ("imagenet", flat_val, ["imagenet/val/*/*", "one folder per synset"]),
    ("imagenet", remove("imagenet/train"), ["imagenet/train/*/* missing"]),
    ("imagenet", remove("imagenet/val/n01440764"), ["train and test differ", "n01440764"]),
    ("imagenet", write("imagenet/meta.bin", b"nothing"), ["data=imagenet", "imagenet"]),
    ("folder", lambda root: (root / "empty").mkdir(), ["empty", "at least one image"]),
    ("folder", lambda root: (root / "train").mkdir(), ["train"]),
    ("folder", only_class, ["has one class, class_0", "at least two"]),
]


@pytest.mark.parametrize(("name", "breaks", "parts"), BROKEN, ids=[f"{b[0]}-{i}" for i, b in enumerate(BROKEN)])
def test_broken_sets(name, breaks, parts, tmp_path, monkeypatch):
    fakes.accept_fake_flowers(monkeypatch)
    values = {"num_classes": 4, "val_fraction": 0.1} if name == "imagenet" else {}
    SETS[name][0](tmp_path)
    breaks(tmp_path)
    with pytest.raises(UserError) as error:
        build(name, root=str(tmp_path), **({"fallback": []} if name == "fashion_mnist" else {}), **values)
    one_line(error, *parts)


def test_a_fraction_that_leaves_nothing(tmp_path):
    with pytest.raises(UserError) as error:
        build("folder", root=str(fakes.image_folder(tmp_path)), val_fraction=0.01)
    one_line(error, "data.val_fraction=0.01", "val", "23 images")


def test_wrong_number_of_classes(tmp_path):
    with pytest.raises(UserError) as error:
        build("folder", root=str(fakes.image_folder(tmp_path)), num_classes=5)
    one_line(error, "data.num_classes=5", "3 classes")


def test_flowers_with_other_mat_files_fail_the_checksum(tmp_path):
    with pytest.raises(UserError) as error:
        build("flowers", root=str(fakes.flowers(tmp_path)))
    one_line(error, "imagelabels.mat or setid.mat", "not the original")


def test_downloaded_data_are_read(tmp_path, monkeypatch):
    from torchvision.datasets import OxfordIIITPet

    monkeypatch.setattr(OxfordIIITPet, "_download", lambda self: fakes.pets(Path(self.root)))
    assert build("pets", root=str(tmp_path / "new"), download=True).sizes["test"] == 37


def test_a_failing_download_is_one_line(tmp_path, monkeypatch):
    from torchvision.datasets import OxfordIIITPet

    def fail(self):
        raise OSError("no route\nto host")

    monkeypatch.setattr(OxfordIIITPet, "_download", fail)
    with pytest.raises(UserError) as error:
        build("pets", root=str(tmp_path), download=True)
    one_line(error, "data=pets", "download", str(tmp_path), "no route to host")
    fakes.pets(tmp_path)  # what is there is not fetched
    assert build("pets", root=str(tmp_path), download=True).sizes["test"] == 37


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "bomb", "gone"])
def test_an_unreadable_image_stops_and_is_named(tmp_path, kind, workers):
    fakes.image_folder(tmp_path, classes=2, per_class=40)
    data = build("folder", root=str(tmp_path), num_workers=workers)
    bad = Path(data.splits["train"].source.images[data.splits["train"].indices[0]])
    {"truncated": fakes.truncate, "bomb": fakes.png_bomb, "gone": Path.unlink}[kind](bad)
    with pytest.raises(UserError) as error:
        epoch(data.train_dataloader())
    one_line(error, str(bad), "data.on_error=skip", "DecompressionBomb" if kind == "bomb" else "Error")
    assert "Caught" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_can_be_skipped(tmp_path, workers, caplog):
    fakes.image_folder(tmp_path, classes=2, per_class=40)
    data = build("folder", batch_size=8, root=str(tmp_path), num_workers=workers, on_error="skip")
    split, test = data.splits["train"], data.splits["test"]
    bad = [Path(s.source.images[i]) for s in (split, test) for i in s.indices[[0, 3, 4]]]
    for file in bad:
        fakes.truncate(file)

    with caplog.at_level(logging.WARNING, "amod"):
        batches = epoch(data.train_dataloader())
    assert {len(batch[0]) for batch in batches} == {8}  # their places are filled: Mixup needs an even batch
    assert not {0, 3, 4} & set(np.searchsorted(split.indices, torch.cat([b[2] for b in batches]).numpy()))
    assert str(bad[0].parent) in caplog.records[-1].message

    caplog.clear()
    with caplog.at_level(logging.WARNING, "amod"):
        tested = torch.cat([batch[2] for batch in data.test_dataloader()])
    assert sorted(tested.tolist()) == sorted(set(test.indices) - set(test.indices[[0, 3, 4]]))
    assert caplog.records[-1].message.startswith("3 unreadable images")


def test_a_whole_batch_of_evaluation_may_be_unreadable(tmp_path):
    fakes.image_folder(tmp_path, classes=2, per_class=40)
    data = build("folder", batch_size=8, root=str(tmp_path), num_workers=0, on_error="skip")
    test = data.splits["test"]
    data.eval_batch_size = len(test) - 1
    fakes.truncate(Path(test.source.images[test.indices[-1]]))
    loader = data.test_dataloader()
    assert [len(batch[0]) for batch in loader] == [len(test) - 1]
    assert loader.skipped == 1
    for index in test.indices[:-1]:
        fakes.truncate(Path(test.source.images[index]))
    with pytest.raises(UserError, match=f"none of {len(test)} images can be read; the first: .*png"):
        list(data.test_dataloader())


def test_a_name_that_is_not_utf8_has_its_part():
    assert 0 <= draw_of("caf\udce9.png") < 1


def test_a_batch_of_unreadable_images_is_an_error(tmp_path):
    fakes.image_folder(tmp_path, classes=2, per_class=10)
    for file in tmp_path.glob("*/*.png"):
        fakes.truncate(file)
    with pytest.raises(UserError) as error:
        epoch(build("folder", batch_size=4, root=str(tmp_path), on_error="skip").train_dataloader())
    one_line(error, "no image of a batch of 4", ".png")


def test_odd_images_become_rgb(tmp_path):
    from PIL import Image

    for label in "ab":
        (tmp_path / label).mkdir()
        for number, mode in enumerate(["L", "RGBA", "P", "1", "I;16", "LA", "L", "L", "L", "L"]):
            Image.new(mode, (40, 30)).save(tmp_path / label / f"{number}.png")
        Image.new("CMYK", (40, 30)).save(tmp_path / label / "cmyk.jpg")
    data = build("folder", root=str(tmp_path))
    assert all(batch[0].shape[1:] == (3, 28, 28) for batch in data.train_dataloader())


def test_a_user_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UserError("one line")))
    assert isinstance(error, UserError)
    assert str(error) == "one line"


# --- what commands rely on ----------------------------------------------------------------------------------------


def test_checking_needs_no_heavy_import():
    code = (
        "import sys; from amod.training.data import check_data; from amod.errors import UserError\n"
        "from amod.training.config import Data\n"
        "try: check_data(Data(name='flowers', root='/nowhere'))\n"
        "except UserError: print(sorted({'torch', 'timm', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fake_flowers_in_a_subprocess(tmp_path):
    fakes.flowers(tmp_path)
    code = (
        "import sys; assert 'torchvision' not in sys.modules\n"
        "from torchvision.datasets import Flowers102; print(len(Flowers102(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=fakes.fake_flowers_env(tmp_path))
    assert done.stdout.strip() == "102", done.stderr


def test_16_bit_grey_keeps_its_greys(tmp_path):
    """PIL's own conversion clips every value above 255 to white."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = np.asarray(open_rgb(str(tmp_path / "a.png")))
    assert image.shape == (8, 8, 3)
    assert np.array_equal(image[..., 0], (ramp >> 8).astype(np.uint8))


def test_a_class_without_images_in_a_part_is_said(tmp_path, caplog):
    shades = {"common": 40, "rare": 1}
    for name, count in shades.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}/{number}.png")
    build("folder", root=str(tmp_path))
    said = [line for line in caplog.messages if "images of rare" in line]
    assert len(said) == 2  # of two of the three parts


def test_a_link_that_leads_back_is_refused(tmp_path):
    folder = fakes.image_folder(tmp_path / "images")
    place = next(path for path in sorted(folder.rglob("*")) if path.suffix == ".png" or path.is_file()).parent
    (place / "all").symlink_to(tmp_path / "images", target_is_directory=True)
    with pytest.raises(UserError, match="once more, by a link; remove the link"):
        build("folder", root=str(folder))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    folder, walk = fakes.image_folder(tmp_path), os.walk

    def refused(top, onerror=None, **kwargs):
        if onerror is not None:
            onerror(PermissionError(13, "Permission denied", str(top)))
        return walk(top, **kwargs)

    monkeypatch.setattr(os, "walk", refused)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); make it readable"):
        build("folder", root=str(folder))


def test_a_name_of_two_classes_of_the_model_is_not_guessed(tmp_path):
    source = Source(["a", "b"], np.array([0, 1]), ["tench", "crane"])
    assert aligned(source, ["crane", "tench"], tmp_path).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="crane names two classes of the model"):
        aligned(source, ["tench", "crane", "crane"], tmp_path)


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("training", "testing"), "training|testing"),
        (("Train", "Val", "Test"), "Train|Val|Test"),
        (("train", "validation", "test"), "validation"),
    ],
)
def test_parts_are_never_taken_for_classes(tmp_path, folders, named):
    for part in folders:
        fakes.image_folder(tmp_path / part)
    with pytest.raises(UserError, match=f"({named}): is it a part or a class"):
        build("folder", root=str(tmp_path))
