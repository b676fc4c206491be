"""Exported files give what the model gives, at any batch size, or there is no file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import amod
import export
import tiny
from amod import ClassOnly, Merge, Prune, Route, exporting, routing
from amod.deploy import calibration_images, picture, predict
from amod.exporting import Agreement, Exported, compare
from amod.hub import class_names_of
from amod.reduce import match, merge
from amod.routing import RoutedLayer
from amod.runtimes import Session, open_session
from amod.training.command import terminated
from amod.training.compose import compose_config

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
PLANS = {
    "routed": {1: Route(0.5), 2: Route(0.25, keep_prefix=True), 3: Route(0.5, "linear")},
    "reduced": {0: Merge(3, 0.75, norm=True), 1: Prune(0.5), 2: Route(0.5), 3: ClassOnly()},
}
BOTH = {0: Merge(3, 0.75, norm=True), 1: Prune(0.5), 2: Route(0.5, "linear", keep_prefix=True), 3: ClassOnly()}
SRC = Path(__file__).parents[1] / "src"


def model(plan, name="vit_tiny_patch16_224", **kwargs):
    vit = timm.create_model(name, **{**TINY, **kwargs})
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return amod.convert(vit, plan=plan).eval()


# --- what reaches the graph


def test_while_exporting_the_same_tokens_are_kept_and_merged(monkeypatch):
    scores = torch.rand(3, 17)
    keys, x, size = torch.randn(3, 17, 8), torch.randn(3, 17, 8), 1 + torch.rand(3, 17)
    kept, merged = routing.top_k(scores, 6, 2), merge(x, size, match(keys, 5, 1), 1)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert torch.equal(routing.top_k(scores, 6, 2), kept)
    for ours, theirs in zip(merge(x, size, match(keys, 5, 1), 1), merged, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_trace_is_right_at_every_batch_size(plan):
    routed = model(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(routed, torch.randn(2, 3, 32, 32), check_trace=False)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(trace(images), routed(images))


def test_a_trace_that_would_bake_in_the_image_size_is_refused():
    with pytest.raises(amod.UserError, match=r"torch.jit.trace.*amod.export"):
        torch.jit.trace(model(PLANS["routed"], dynamic_img_size=True), torch.randn(2, 3, 32, 32))


# --- files


@pytest.mark.parametrize(
    ("suffix", "plan"),
    [(".pt2", PLANS["routed"]), (".onnx", PLANS["routed"]), (".onnx", PLANS["reduced"]), (".xml", BOTH)],
)
def test_a_file_gives_what_the_model_gives(tmp_path, plan, suffix):
    if suffix != ".pt2":
        pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}[suffix])
    routed = model(plan).train()
    found = amod.export(routed, tmp_path / f"model{suffix}")
    assert routed.training
    assert found.tokens_differ == 0
    assert found.tokens == 4 * sum(k for i, k in routed.tokens_kept(17).items() if isinstance(plan[i], Route))
    session = open_session(tmp_path / f"model{suffix}")
    images = torch.randn(6, 3, 32, 32)
    torch.testing.assert_close(torch.as_tensor(session(images.numpy())[0]), routed.eval()(images), atol=1e-4, rtol=1e-4)
    known = open_session(tmp_path / f"model{suffix}", batch=2)
    if suffix == ".xml":
        with pytest.raises(RuntimeError, match=r"shape=\[2,3,32,32\].* incompatible"):  # it knows all shapes
            known(images[:3].numpy())
    logits = torch.cat([torch.as_tensor(known(pair.numpy())[0]) for pair in images.split(2)])
    torch.testing.assert_close(logits, routed(images), atol=1e-4, rtol=1e-4)
    assert session.facts["mean"] == [0.5, 0.5, 0.5]
    assert amod.plan.from_data(session.facts["plan"]) == plan
    assert {file.name for file in tmp_path.iterdir()} <= {f"model{suffix}", "model.bin"}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_model_of_any_image_size_is_a_file_of_any_image_size(tmp_path, suffix):
    """Of whole patches: K follows N in whole numbers, 9, 4 and 9 of 19 tokens of 24 x 48 pixels."""
    routed = model(PLANS["routed"], dynamic_img_size=True)
    path = tmp_path / f"model{suffix}"
    amod.export(routed, path)
    session = open_session(path)
    assert session.facts["any_size"]
    for size in ((24, 48), (32, 32), (40, 16)):
        images = torch.randn(3, 3, *size)
        logits, *kept = map(torch.as_tensor, session(images.numpy()))
        with torch.no_grad():
            wanted, steps = routed(images, return_routing=True)
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(one, step.indices) for one, step in zip(kept, steps, strict=True))
        assert [one.shape[1] for one in kept] == [routed.plan[i].kept(wanted_tokens(size)) for i in (1, 2, 3)]


def wanted_tokens(size: tuple[int, int]) -> int:
    return 1 + size[0] * size[1] // 64


def test_what_cannot_be_of_any_size_says_so_in_the_file(tmp_path):
    for plan, form in ((PLANS["routed"], "openvino"), (PLANS["reduced"], "onnx")):
        assert not exporting.any_size(model(plan, dynamic_img_size=True), form)
    assert not exporting.any_size(model(PLANS["routed"]), "onnx")


def test_a_rotary_model(tmp_path):
    name = {"name": "vit_small_patch16_dinov3", "patch_size": 16, "img_size": 64, "depth": 2}
    amod.export(model({1: Route(0.5)}, **name), tmp_path / "model.pt2")


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_int8_is_near_the_model(tmp_path, form):
    """Whatever the file is called: one of this name was written over itself while OpenVINO had it mapped."""
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "nncf"}[form])
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[form]
    routed, images = model({1: Route(0.5)}, depth=2), torch.randn(8, 3, 32, 32)
    found = amod.export(routed, tmp_path / f"quantised{suffix}", images=images, int8=True)
    assert 0 < found.difference < 0.5 * found.scale
    session = open_session(tmp_path / f"quantised{suffix}", batch=1)
    assert session.facts["input_size"] == [3, 32, 32]
    assert torch.as_tensor(session(images[:1].numpy())[0]).shape == (1, 7)


SIGNALLED = """
import gc, os, signal, sys
import amod
from amod.runtimes import open_session
from test_export import model, torch
routed, images = model({}, depth=1), torch.randn(8, 3, 32, 32)
for name, int8 in (("a", False), ("b", True)):
    amod.export(routed, f"{sys.argv[1]}/{name}.xml", images=images, int8=int8)
sessions = [open_session(__import__("pathlib").Path(f"{sys.argv[1]}/{name}.xml")) for name in "ab"]
while sessions:  # the first goes first
    sessions.pop(0)
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("answered"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_process_that_used_openvino_survives_a_signal(tmp_path):
    pytest.importorskip("nncf")
    paths = os.pathsep.join([str(SRC), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SIGNALLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("answered\n")


# --- refused, with nothing left


def test_other_logits_are_an_error_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "open_session", lambda *_: Session(lambda x: [torch.ones(len(x), 7)], {}, ""))
    with pytest.raises(amod.UserError, match="does not give what the model gives"):
        amod.export(model({}), tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


class Fake:
    """A model of two classes and one routed block, which keeps the last two of three tokens."""

    def __init__(self, scores):
        self.scores = torch.tensor([scores])

    def walk(self, images):
        kept = RoutedLayer(1, self.scores.repeat(len(images), 1), torch.tensor([[1, 2]]).repeat(len(images), 1))
        return torch.tensor([[1.0, 2.0]]).repeat(len(images), 1), [kept]


def file(*outputs):
    """A file that gives these rows, those of image i for the images that are filled with i."""

    def run(images):
        at = images[:, 0].astype(int) % len(outputs)
        return [torch.tensor([outputs[i][0] for i in at]), torch.tensor([outputs[i][1] for i in at])]

    return Session(run, {}, "")


GOOD, SWAPPED, OFF = ([1.0, 2.0], [1, 2]), ([2.5, 2.0], [0, 2]), ([1.1, 2.0], [1, 2])
IMAGES = torch.arange(4.0).unsqueeze(1)


def test_the_agreement_by_hand():
    found = compare(Fake([0.1, 0.3, 0.6]), file(SWAPPED), IMAGES, strict=False)
    assert found == Agreement(4, difference=1.5, scale=2.0, tokens=8, tokens_differ=4, top1=0.0)


@pytest.mark.parametrize(
    ("scores", "outputs", "right"),
    [
        ([0.1, 0.3, 0.6], [GOOD], True),
        ([0.3, 0.3 + 1e-6, 0.6], [GOOD, SWAPPED], True),  # a near tie, and what follows from it
        ([0.1, 0.3, 0.6], [GOOD, SWAPPED], False),
        ([0.3, 0.3 + 1e-6, 0.6], [OFF, SWAPPED], False),  # the tie of one image is no excuse for another
        ([0.3, 0.3 + 1e-6, 0.6], [SWAPPED], False),  # nothing is left to compare
        ([0.1, 0.3, 0.6], [GOOD, ([float("nan"), 2.0], [1, 2])], False),
        ([float("nan")] * 3, [GOOD, SWAPPED], False),
        ([0.1, 0.3, 0.6], [([1.0], [1, 2])], False),
    ],
)
def test_only_near_ties_are_forgiven(scores, outputs, right):
    with contextlib.nullcontext() if right else pytest.raises(amod.UserError, match="the exported file"):
        compare(Fake(scores), file(*outputs), IMAGES, strict=True)


def test_a_file_that_keeps_the_wrong_tokens_is_refused(tmp_path, monkeypatch):
    def write(program, path, names, facts):
        with monkeypatch.context() as patch:
            patch.setattr("amod.walk.top_k", lambda scores, k, prefix: routing.top_k(-scores, k))
            wrong = exporting.traced(Exported(routed), (3, 32, 32))
        torch.export.save(wrong, path, extra_files={"amod.json": "{}"})

    routed = model({1: Route(0.5)}, depth=2)
    monkeypatch.setitem(exporting.WRITERS, "torch", write)
    with pytest.raises(amod.UserError, match=r"does not give what the model gives .* kept tokens differ"):
        amod.export(routed, tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("plan", "file", "options", "words"),
    [
        ({1: Route(0.5, "random")}, "a.onnx", {}, "router=random, which draws anew"),
        ({}, "a.tflite", {}, "its suffix names no format; use .onnx, .xml, .pt2"),
        ({}, "a.onnx", {"format": "tf"}, "format='tf': choose one of onnx, openvino, torch"),
        ({}, "a.onnx", {"format": "torch"}, "ends in .pt2"),
        ({}, "a.pt2", {"int8": True, "images": torch.zeros(4, 3, 32, 32)}, "no quantiser"),
        ({}, "a.onnx", {"int8": True}, "needs images"),
        ({}, "a.pt2", {"images": torch.zeros(2, 3, 32, 32)}, r"\(2, 3, 32, 32\); at least 4 prepared"),
        ({}, "a.pt2", {"images": torch.zeros(4, 3, 48, 48)}, r"needs prepared images \(B, 3, 32, 32\)"),
        ({}, "a.pt2", {"images": torch.zeros(4, 3, 32, 32).numpy()}, "images: ndarray"),
        ({}, "a.pt2", {"images": torch.full((4, 3, 32, 32), torch.nan)}, "not finite"),
        ({}, "a.pt2", {"images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)}, "images: are torch.uint8"),
        ({}, "/dev/null/folder/a.pt2", {}, "/dev/null/folder: cannot be written"),
        ({}, "a.pt2", {"input_size": 32}, "input_size=32"),
    ],
)
def test_mistakes_are_explained(tmp_path, plan, file, options, words):
    with pytest.raises(amod.UserError, match=words):
        amod.export(model(plan), tmp_path / file, **options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": torch.zeros(4, 3, 35, 40)}, "images: 35 x 40 pixels are no whole patches of 8 x 8"),
        ({"images": torch.zeros(4, 1, 40, 40)}, r"images: \(4, 1, 40, 40\)"),
        ({"input_size": (3, 30, 32)}, "input_size: 30 x 32 pixels are no whole patches"),
    ],
)
def test_a_file_of_any_size_is_of_whole_patches(tmp_path, options, words):
    with pytest.raises(amod.UserError, match=words):
        amod.export(model({}, dynamic_img_size=True), tmp_path / "a.onnx", **options)
    assert not [*tmp_path.iterdir()]


def test_a_compiled_model_is_refused(tmp_path):
    with pytest.raises(amod.UserError, match="is compiled; export the one"):
        amod.export(torch.compile(model({})), tmp_path / "a.onnx")


def test_files_of_others_are_one_line(tmp_path):
    pytest.importorskip("onnx")
    amod.export(model({}, depth=1), tmp_path / "a.onnx")
    import onnx

    made = onnx.load(tmp_path / "a.onnx")
    del made.metadata_props[:]
    onnx.save(made, tmp_path / "a.onnx")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.randn(1, 2),)), tmp_path / "a.pt2")
    for name in ("a.onnx", "a.pt2"):
        with pytest.raises(amod.UserError, match=f"{name}: was not made by amod.export"):
            open_session(str(tmp_path / name))


def test_a_model_of_half_precision_is_refused_and_modes_are_left(tmp_path):
    with pytest.raises(amod.UserError, match=r"give model.float\(\)"):
        amod.export(model({}).bfloat16(), tmp_path / "a.pt2")
    routed = model({1: Route(0.5)}).train()
    routed.norm.eval()
    amod.export(routed, tmp_path / "a.pt2")
    assert [name for name, module in routed.named_modules() if not module.training] == ["norm"]


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("amod.runtimes.find_spec", lambda name: None)
    with pytest.raises(amod.UserError, match=r"needs onnx, onnxscript, onnxruntime; pip install 'amod\[export\]'"):
        amod.export(model({}), tmp_path / "a.onnx")


def test_the_exported_module_names_what_it_gives():
    assert Exported(model(PLANS["reduced"])).names == ["logits", "kept_2"]


# --- the command


def test_the_command_exports_times_and_reads_a_picture(tmp_path, capsys):
    saved = amod.save_pretrained(model({1: Route(0.5)}, depth=2), tmp_path / "saved", class_names=list("abcdefg"))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "red").save(photo)
    settings = [f"run={saved}", "format=torch", f"example={photo}", "rounds=1"]
    export.job(export.check(compose_config("export", settings)))
    printed = capsys.readouterr().out
    assert "4 images: logits differ by at most" in printed
    assert "one image, torch" in printed
    names = [name for name, _ in predict(open_session(saved / "model.pt2"), photo)]
    assert [line.split()[-1] for line in printed.splitlines()[-5:]] == names
    assert set(names) <= set("abcdefg")


def test_a_model_of_one_output_has_no_classes(tmp_path, capsys):
    """A share of 100 % would say nothing."""
    saved = amod.save_pretrained(model({1: Route(0.5)}, depth=2, num_classes=1), tmp_path / "saved")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.png")
    settings = [f"run={saved}", "format=torch", f"example={tmp_path / 'photo.png'}", "rounds=1"]
    export.job(export.check(compose_config("export", settings)))
    printed = capsys.readouterr().out
    assert "same class" not in printed
    assert "%" not in printed.splitlines()[-1]
    ((name, value),) = predict(open_session(saved / "model.pt2"), tmp_path / "photo.png")
    assert printed.splitlines()[-1] == f"  {value:.4g}  {name}"


def test_a_full_disk_and_a_command_that_is_ended_leave_nothing_half_written(tmp_path, monkeypatch):
    def full(program, path, *_):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(exporting.WRITERS, "torch", full)
        with pytest.raises(amod.UserError, match=r"model.pt2: cannot be written .*No space left"):
            amod.export(model({}), tmp_path / "model.pt2")
    monkeypatch.setitem(exporting.WRITERS, "torch", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, terminated)
    with pytest.raises(SystemExit) as ended:
        amod.export(model({}), tmp_path / "model.pt2")
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not [*tmp_path.iterdir()]


def test_every_model_has_a_file_of_its_own():
    asked = [
        [],
        ["data=digits"],
        ["budget=75%"],
        ["budget=50%"],
        ["placement=late"],
        ["router=tome"],
        ["router=tome", "router.r=4"],
    ]
    configs = [export.check(compose_config("export", ["model=vit_pico", *settings])) for settings in asked]
    names = [export.output_of(cfg) for cfg in configs]
    assert len({*names}) == len(names)
    assert names[0].parent == Path("exports")
    assert names[0].name.startswith("vit_pico-attention-")


def test_a_checkpoints_classes_keep_their_names(tmp_path):
    tiny.run(tmp_path / "run", "router=none", "schedule.epochs=1", "trainer.limit_train_batches=1", "data.crop_pct=0.8")
    asked = ["router=merge", "budget=75%", f"model.checkpoint={tmp_path}/run", *tiny.MODEL]
    model = export.model_of(export.check(compose_config("export", asked)))
    assert class_names_of(model) == [str(digit) for digit in range(10)]
    assert model.pretrained_cfg["crop_pct"] == 0.8


def test_pictures_are_read_as_in_training_and_from_all_of_a_folder(tmp_path):
    for i in range(12):
        folder = tmp_path / "abc"[i // 4]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(folder / f"{i:02}.png")
    (tmp_path / "a" / "._00.png").write_bytes(b"of a Mac")
    every = calibration_images(model({}), tmp_path, 100)
    assert len(every) == 12
    assert torch.equal(calibration_images(model({}), tmp_path, 9), every[[0, 1, 2, 4, 5, 6, 8, 9, 10]])
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert picture(tmp_path / "turned.jpg", lambda image: image.size) == (20, 40)
    assert picture(tmp_path / "clear.png", lambda image: image.getpixel((0, 0))) == (255, 255, 255)


def test_a_model_that_pools_nothing_is_exported(tmp_path):
    found = amod.export(model({1: Merge(2)}, num_classes=0, global_pool=""), tmp_path / "tokens.pt2")
    assert found.difference < 1e-3


def test_a_text_as_example_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "text.txt").write_text("no picture")
    settings = [
        "model=vit_pico",
        "model.pretrained=false",
        f"example={tmp_path / 'text.txt'}",
        f"output={tmp_path}/a.onnx",
    ]
    with pytest.raises(amod.UserError, match="cannot be read as a picture"):
        export.job(export.check(compose_config("export", settings)))
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["output=foo.bin"], "output=foo.bin: a file of format=onnx ends in .onnx"),
        (["images=.", "images_max=2"], "images_max=2: must be a whole number of at least 4"),
    ],
)
def test_what_is_known_beforehand_is_said_before_the_model_is_built(settings, words):
    with pytest.raises(amod.UserError, match=words):
        export.check(compose_config("export", ["model=vit_pico", *settings]))


def test_a_mistake_in_the_command_is_one_line(tmp_path):
    command = [sys.executable, str(SRC / "export.py"), "run=x", "int8=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: int8=true: needs images=FOLDER")
    assert len(done.stderr.splitlines()) == 1


def test_metadata_is_json():
    facts = exporting.metadata(model(PLANS["reduced"]), (3, 32, 32))
    assert json.loads(json.dumps(facts))["crop_pct"] == 0.9
