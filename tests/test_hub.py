"""Saved, loaded, shared: the plan goes with the weights, and timm reads the dense model from the same folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import amod
import tiny
from amod import ClassOnly, Merge, Prune, Route
from amod.exporting import metadata
from amod.hub import class_names_of
from amod.training.finished import load_run
from hub_models import build

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
PLANS = {
    "attention": {1: Route(0.5), 3: Route(0.25)},
    "linear": {1: Route(0.5, "linear", activation="sigmoid"), 2: Route(0.5, "linear")},
    "reduced": {0: Merge(3), 1: Prune(0.5, fuse=False), 3: ClassOnly()},
    "dense": {},
}


def model(plan, **kwargs):
    vit = timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs})
    return amod.convert(vit, plan=plan).eval()


@pytest.fixture
def saved(tmp_path):
    return amod.save_pretrained(model(PLANS["linear"]), tmp_path / "saved")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_folder_gives_the_same_model(tmp_path, plan):
    before = model(plan)
    folder = amod.save_pretrained(
        before, tmp_path / "deep" / "saved", class_names=list("abcde"), training={"epochs": 3}
    )
    after = amod.from_pretrained(folder)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(after(images), before(images))
    assert getattr(after, "plan", {}) == plan
    assert not after.training
    assert after.pretrained_cfg["label_names"] == list("abcde")
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == ["saved"]
    config = json.loads((folder / "config.json").read_text())
    assert config["amod"]["training"] == {"epochs": 3}
    assert amod.save_pretrained(after, folder) == folder  # again over it, the names kept
    assert amod.from_pretrained(folder).pretrained_cfg["label_names"] == list("abcde")


def test_timm_reads_the_dense_model_from_it(saved):
    before = amod.from_pretrained(saved)
    dense = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    assert type(dense) is before.undressed
    state = before.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())
    assert {*load_file(saved / "model.safetensors")} == {*dense.state_dict()}
    assert "local-dir:saved" in (saved / "README.md").read_text()
    assert "Route(capacity=0.5" in (saved / "README.md").read_text()


def test_a_shortened_and_a_rotary_model(tmp_path):
    short = amod.truncate(timm.create_model("vit_tiny_patch16_224", **TINY), 2).eval()
    rotary = timm.create_model(
        "vit_small_patch16_dinov3", img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    for before in (short, amod.convert(rotary, capacity=0.5).eval()):
        after = amod.from_pretrained(amod.save_pretrained(before, tmp_path / type(before).__name__))
        images = torch.randn(2, 3, *before.patch_embed.img_size)
        assert torch.equal(after(images), before(images))


def test_from_the_hubs_cache_without_a_network(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--somebody--routed"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    saved.rename(repo / "snapshots" / commit)
    monkeypatch.setattr("amod.hub.snapshot_download", _with_cache(str(tmp_path / "cache")))
    assert amod.from_pretrained("somebody/routed").plan == PLANS["linear"]
    with pytest.raises(amod.UserError, match="somebody/else: no such folder, and the hub gives no such model"):
        amod.from_pretrained("somebody/else")


def _with_cache(folder):
    return lambda repo, **kwargs: huggingface_hub.snapshot_download(
        repo, cache_dir=folder, local_files_only=True, **kwargs
    )


def test_pushing_sends_the_folder(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, repo_id, **kwargs):
            sent[repo_id] = sorted(file.name for file in folder_path.iterdir())

    monkeypatch.setattr("amod.hub.HfApi", Api)
    amod.push_to_hub(model(PLANS["linear"]), "somebody/routed")
    assert sent == {"somebody/routed": ["README.md", "config.json", "model.safetensors", "routers.safetensors"]}


def test_a_finished_run(tmp_path):
    tiny.run(tmp_path / "run", "router=attention", "capacity=0.5", "schedule.epochs=1", "data.crop_pct=0.5")
    _, trained, data = load_run(tmp_path / "run")
    loaded = amod.from_pretrained(tmp_path / "run")
    images = torch.randn(3, 3, 10, 10)
    assert torch.equal(loaded(images), trained(images))
    assert loaded.plan == trained.plan
    assert loaded.pretrained_cfg["label_names"] == [*data.class_names]
    saved = amod.from_pretrained(amod.save_pretrained(loaded, tmp_path / "saved"))
    assert torch.equal(saved(images), trained(images))
    assert saved.pretrained_cfg["label_names"] == [*data.class_names]
    for model in (loaded, saved):  # images are prepared as in the run, whatever timm says of the model
        assert metadata(model, (3, 10, 10))["crop_pct"] == 0.5
    (tmp_path / "run" / "weights.safetensors").unlink()
    _refused(tmp_path / "run", "is not finished")


def edit(saved, change):
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config))


def test_weights_of_another_architecture(saved):
    edit(saved, lambda config: config["model_args"].update(embed_dim=48))
    _refused(saved, "model.safetensors: is not of the vit_tiny_patch16_224", "not \\(1, 1, 48\\)")


def test_another_plan_than_the_routers(saved):
    edit(saved, lambda config: config["amod"]["plan"].pop("2"))
    _refused(saved, "routers.2.weight is not of this model")


def test_a_newer_plan(saved):
    edit(saved, lambda config: config["amod"].update(format=2, version="9.9"))
    _refused(saved, "format 2, saved by amod 9.9", "install a newer amod")


def test_a_pickle(saved):
    torch.save({}, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    _refused(saved, "pytorch_model.bin is a pickle")


def test_bytes_that_are_no_weights(saved):
    (saved / "model.safetensors").write_bytes(b"nothing")
    _refused(saved, "cannot be read as safetensors")


def test_no_model_there(tmp_path):
    _refused(tmp_path, "no saved model")


def test_a_wrong_number_of_names_and_a_file_in_the_way(tmp_path):
    with pytest.raises(amod.UserError, match="3 names for a model of 5 classes"):
        amod.save_pretrained(model({}), tmp_path / "new", class_names=["a", "b", "c"])
    assert not (tmp_path / "new").exists()
    save_file({}, tmp_path / "file")
    with pytest.raises(amod.UserError, match="is a file"):
        amod.save_pretrained(model({}), tmp_path / "file")
    with pytest.raises(amod.UserError, match="class_names='abcde': must be a list"):
        amod.save_pretrained(model({}), tmp_path / "new", class_names="abcde")


def test_a_runs_folder_stays_the_runs(tmp_path):
    """from_pretrained reads it as the run, whatever else is saved there."""
    (tmp_path / "config.yaml").touch()
    for routed in (model({}), build("Bert")):
        with pytest.raises(amod.UserError, match="is a training run's folder, which is read as that run"):
            amod.save_pretrained(routed, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_save_that_is_cut_off_leaves_no_mixture_of_two_models(saved, monkeypatch):
    move = Path.replace

    def full(self, target):
        if self.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(amod.UserError, match=r"saved: cannot be written \(No space left on device\)"):
        amod.save_pretrained(model(PLANS["attention"]), saved)
    _refused(saved, "no saved model")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
def test_a_folder_of_another_disk(saved, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        (tmp_path / "link").symlink_to(there)
        amod.save_pretrained(amod.from_pretrained(saved), tmp_path / "link")
        amod.save_pretrained(model(PLANS["attention"]), tmp_path / "link")
        assert amod.from_pretrained(tmp_path / "link").plan == PLANS["attention"]
        assert not [*Path(there).glob(".amod-*")]


def test_names_go_with_the_head_that_they_are_of(tmp_path):
    loaded = amod.from_pretrained(amod.save_pretrained(model({}), tmp_path / "named", class_names=list("abcde")))
    for classes in (3, 0):
        loaded.reset_classifier(classes)
        assert metadata(loaded, (3, 32, 32))["class_names"] is None
        again = amod.from_pretrained(amod.save_pretrained(loaded, tmp_path / "other"))
        assert (again.num_classes, class_names_of(again)) == (classes, None)


def _refused(folder, *words):
    for word in words:
        with pytest.raises(amod.UserError, match=word) as caught:
            amod.from_pretrained(folder)
        assert "\n" not in str(caught.value)
