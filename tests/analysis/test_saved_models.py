from __future__ import annotations

import numpy as np
import pytest
import timm
import transformers
from PIL import Image

import amod
import explain
from amod.analysis import saved_models
from amod.analysis.explain_checks import check_explain
from amod.training.compose import compose_config
from hub_models import build
from test_detection import tiny as tiny_detr

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def saved(kind, folder):
    if kind == "timm":
        vit = timm.create_model("vit_tiny_patch16_224", **VIT)
        amod.save_pretrained(amod.convert(vit, "attention", 0.5), folder, class_names=["cat", "dog", "bird"])
        return
    model = build("ViT", "ForImageClassification")
    amod.save_pretrained(amod.convert(model, "random", 0.5) if kind == "routed" else model, folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["timm", "dense", "routed"])
def test_kept_patches_of_a_saved_model_are_those_that_it_keeps(kind, tmp_path, pictures, monkeypatch):
    saved(kind, tmp_path / "model")
    seen = {}
    monkeypatch.setattr(saved_models, "draw_scores", lambda *_: None)
    draw = saved_models.draw_kept_patches
    monkeypatch.setattr(
        saved_models, "draw_kept_patches", lambda *given: (seen.update(images=given[0], given=given), draw(*given))
    )
    overrides = [f"run={tmp_path}/model", f"images={pictures}", f"output={tmp_path}/out", "capacity=0.25"]
    explain.job(check_explain(compose_config("explain", overrides)))
    assert (tmp_path / "out/kept.png").read_bytes().startswith(b"\x89PNG")
    _, routings, grid, _, _, names, _ = seen["given"]
    ((name, routing),) = routings.items()
    assert name == ("A-MoD, untrained" if kind == "dense" else "the saved plan")
    assert grid == (4, 4)
    kept = 4 if kind == "dense" else 8  # of 17 tokens
    assert [layer.indices.shape for layer in routing] == [(2, kept)] * 2
    assert all(word.startswith("read as ") for word in names)
    assert kind != "timm" or {word.split()[-1] for word in names} <= {"cat", "dog", "bird"}
    assert 0 <= seen["images"].min() < seen["images"].max() <= 1.001  # as they are seen, not as the model takes them


def test_how_deep_the_patches_of_a_saved_avit_went(tmp_path, pictures):
    vit = timm.create_model("vit_tiny_patch16_224", **VIT)
    amod.save_pretrained(amod.convert(vit, "avit", halt_scale=2.0, halt_shift=1.0), tmp_path / "model")
    explain.job(
        check_explain(compose_config("explain", [f"run={tmp_path}/model", f"images={pictures}", f"output={tmp_path}"]))
    )
    assert (tmp_path / "depths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "images=null: run="),
        (["images=nowhere"], "images=nowhere: run="),
        (["images={0}", "mod=other"], "mod=other: is for run folders"),
        (["images={0}", "router=none"], "router=none: routes nothing"),
        (["images={0}", "output={0}/a.png"], "is a file"),
        (["images={0}", "images_max=5"], "images_max=5: does nothing to what is shown of pictures of your own"),
        (["images={0}", "device=cuda"], "device=cuda: does nothing"),
        (["images={0}", "data.root=photos"], "data.root=photos: does nothing"),
    ],
)
def test_what_does_not_go_with_a_saved_model_is_refused(given, words, tmp_path, pictures):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(amod.UserError, match=words):
        check_explain(compose_config("explain", [f"run={tmp_path}", *(g.format(pictures) for g in given)]))


def test_a_folder_without_what_is_needed_is_one_line(tmp_path, pictures):
    build("ViT").save_pretrained(tmp_path / "bare")
    build("Bert").save_pretrained(tmp_path / "text")
    tiny_detr().save_pretrained(tmp_path / "detr")
    (tmp_path / "empty").mkdir()
    for folder, images, words in (
        ("bare", pictures, "has no image processor"),
        ("text", pictures, "reads no images alone"),
        ("detr", pictures, "is a detector; name its run folder"),
    ):
        cfg = check_explain(compose_config("explain", [f"run={tmp_path}/{folder}", f"images={images}"]))
        with pytest.raises(amod.UserError, match=words) as error:
            explain.job(cfg)
        assert "\n" not in str(error.value)
