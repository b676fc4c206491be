"""What people do with a timm model next, done with a converted one: each works as on the dense model."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter

import pytest
import timm
import timm.optim
import torch
import torch.distributed.checkpoint as dcp
from timm.utils import AttentionExtract, freeze
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.testing import assert_close

import amod
from amod.families import check_blocks, check_model
from amod.plan import make_plan
from families import build
from test_vit import IMAGES, small

PLANS = {
    "attention": {1: amod.Route(0.4), 3: amod.Route(0.4), 5: amod.Route(0.4)},
    "linear": {1: amod.Route(0.4, "linear"), 3: amod.Route(0.4, "linear")},
    "few merges": {2: amod.Merge(4), 5: amod.ClassOnly()},
    "evit": {1: amod.Prune(0.7), 3: amod.Prune(0.7)},
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@every_plan
def test_class_names_and_modules_are_timms(plan):
    dense = small(reg_tokens=1)
    model = amod.convert(dense, plan=plan)
    assert isinstance(model, type(dense))
    assert model.plan == plan
    added = {"routers", *(f"routers.{i}" for i, entry in plan.items() if isinstance(entry, amod.Route))}
    assert {name for name, _ in model.named_modules()} - added == {name for name, _ in dense.named_modules()}
    for get in ("named_parameters", "named_buffers"):
        names = [name for name, _ in getattr(model, get)()]
        assert [n for n in names if not n.startswith("routers.")] == [name for name, _ in getattr(dense, get)()]
    assert list(model.state_dict())[: len(dense.state_dict())] == list(dense.state_dict())
    for name in ("num_features", "embed_dim", "num_classes", "feature_info", "default_cfg", "pretrained_cfg"):
        assert getattr(model, name, None) == getattr(dense, name, None)
    shown = repr(model)
    assert shown.startswith("RoutedVisionTransformer(")
    for i, entry in plan.items():
        assert f"plan {i}: {entry}" in shown
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        if "linear" not in str(plan):
            assert torch.equal(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("family", ["augreg", "clip", "dinov2_registers", "eva02", "dinov3", "beit", "relpos"])
def test_layer_decay_through_timms_factory_gives_each_parameter_the_rate_it_has_in_timm(family):
    dense, _ = build(family)
    model = amod.convert(dense, "linear", 0.4)

    def rates(vit):
        groups = timm.optim.create_optimizer_v2(vit, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
        by_id = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        return {name: by_id[id(p)] for name, p in vit.named_parameters()}

    ours, timms = rates(model), rates(dense)
    assert {name: ours[name] for name in timms} == timms
    assert all(ours[name] == (1.0, 0.0) for name in set(ours) - set(timms))  # a router is new, like a head


def test_freezing_by_name_and_by_timms_helper_freezes_what_it_freezes_in_timm():
    dense = small()
    model = amod.convert(dense, "attention", 0.4)
    for vit in (dense, model):
        for name, parameter in vit.named_parameters():
            parameter.requires_grad = name.startswith("blocks.5.")
        freeze(vit, ["blocks.5.mlp"])
    trained = [[name for name, p in vit.named_parameters() if p.requires_grad] for vit in (dense, model)]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 8  # norm1, attention and norm2
    model(IMAGES).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == trained[0]


@every_plan
def test_lora_trains_saves_and_loads(plan, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = amod.convert(small(), plan=plan)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.train()(IMAGES).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 * 2 * 2 + 2
    assert all(grad is not None for grad in trained.values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(again.eval()(IMAGES), model.eval()(IMAGES), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(again(IMAGES), base.eval()(IMAGES))
    merged = again.merge_and_unload()
    assert merged.plan == plan
    assert_close(merged(IMAGES), model(IMAGES), atol=1e-4, rtol=1e-4)


@every_plan
def test_hooks_on_blocks_and_attentions_fire_and_act(plan):
    model = amod.convert(small(), plan=plan)
    fired = []
    for name, module in model.named_modules():
        if (name.startswith("blocks.") and name.count(".") == 1) or name.endswith((".attn", ".mlp", ".norm2")):
            module.register_forward_hook(lambda m, args, out, name=name: fired.append((name, out.shape)))
    before = model(IMAGES)
    assert len({name for name, _ in fired}) == len(fired) == 6 * 4
    assert all(len(shape) == 3 for _, shape in fired)
    for i in (0, 3, 4):
        hook = model.blocks[i].attn.register_forward_hook(lambda module, args, out: out * 0)  # an ablation
        assert not torch.allclose(model(IMAGES), before)
        hook.remove()
    assert torch.equal(model(IMAGES), before)


@every_plan
def test_hooks_on_the_blocks_as_a_whole_fire_and_act(plan):
    model, seen = amod.convert(small(), plan=plan), []
    before = model(IMAGES)
    hooks = [
        model.blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
        model.blocks.register_forward_hook(lambda module, args, out: (seen.append(type(module)), out * 0)[1]),
    ]
    assert not torch.allclose(model(IMAGES), before)
    assert seen == [(*IMAGES.shape[:1], 17, 32), nn.Sequential]
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(IMAGES), before)


class Adapter(nn.Module):
    """Put around a block's attention, as adapters are: it hands on whatever its block gives it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(()))

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs) * self.scale


@every_plan
def test_an_adapter_around_an_attention_or_a_block_acts_and_trains(plan):
    model = amod.convert(small(), plan=plan)
    before = model(IMAGES)
    for i in range(6):
        model.blocks[i].attn = Adapter(model.blocks[i].attn)
    assert torch.equal(model(IMAGES), before)
    for i in range(6):
        model.blocks[i] = Adapter(model.blocks[i])
    assert torch.equal(model(IMAGES), before)
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("scale"))
    with torch.no_grad():
        model.blocks[2].inner.attn.scale.fill_(0.5)
    assert not torch.allclose(model(IMAGES), before)


def test_an_attention_that_cannot_be_read_is_named_when_it_is_about_to_be_used():
    model = amod.convert(small(), "attention", 0.4)
    model.blocks[1].attn = nn.Identity()  # block 1 is routed, nobody reads it
    model.blocks[1].forward = lambda x, **_: x
    model(IMAGES)
    model.blocks[2].attn = timm.layers.Attention(32, 2)
    with pytest.raises(amod.UserError, match=r"block 2: Attention was put there after convert"):
        model(IMAGES)
    model = amod.convert(small(), "attention", 0.4)
    model.blocks[2].attn = Adapter(model.blocks[2].attn)
    model.blocks[2].attn.forward = lambda x, **_: x
    with pytest.raises(amod.UserError, match="block 2: its attention was not called"):
        model(IMAGES)
    model = amod.convert(small(), "tome", r=2)
    model.blocks[2] = small().blocks[2]
    with pytest.raises(amod.UserError, match="block 2"):
        model(IMAGES)


@torch.no_grad()
def test_timms_attention_extract_sees_the_maps_of_the_kept_tokens():
    dense = small()
    for block in dense.blocks:
        block.attn.fused_attn = False
    model = amod.convert(dense, "attention", 0.4)
    maps = AttentionExtract(model, method="hook")(IMAGES)
    assert len(maps) == 6
    assert [m.shape[-1] for m in maps.values()] == [17, 6] * 3
    routing = model(IMAGES, return_routing=True)[1]
    assert_close(maps["blocks.0.attn.attn_drop"].mean(dim=(1, 2)), routing[0].scores)


def test_grad_cam_on_a_scored_block():
    model, seen = amod.convert(small(), "attention", 0.4), {}
    block = model.blocks[4]
    block.register_forward_hook(lambda m, args, out: seen.update(out=out))
    block.register_full_backward_hook(lambda m, grad_in, grad_out: seen.update(grad=grad_out[0]))
    model(IMAGES)[:, 1].sum().backward()
    assert (seen["grad"] * seen["out"]).sum(dim=-1).shape == (3, 17)
    assert seen["grad"].abs().sum() > 0


@every_plan
def test_checkpoint_wrappers_around_blocks_run_them_again(plan):
    model = amod.convert(small(), plan=plan).train()
    plain = copy.deepcopy(model)
    plain(IMAGES).square().sum().backward()
    calls = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    kinds = tuple({type(block) for block in model.blocks})
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    model(IMAGES).square().sum().backward()
    assert len(calls) == 12
    for wrapped, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(wrapped.grad, expected.grad)


@every_plan
def test_each_block_compiled_by_itself(plan):
    model = amod.convert(small(), plan=plan)
    expected = model(IMAGES)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_close(model(IMAGES), expected, atol=1e-5, rtol=1e-4)
    assert compiled


@every_plan
def test_compile_of_the_whole(plan):
    model = amod.convert(small(), plan=plan)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "strict"),
    [("attention", True), ("attention", False), ("linear", False), ("few merges", True), ("evit", False)],
)
def test_export_of_the_whole(name, strict):
    model = amod.convert(small(), plan=PLANS[name])
    program = torch.export.export(model, (IMAGES,), dynamic_shapes={"x": {0: torch.export.Dim("b")}}, strict=strict)
    assert not any("amod" in str(node.target) for node in program.graph.nodes)
    batch = torch.cat([IMAGES, IMAGES.flip(0)])
    assert_close(program.module()(batch), model(batch), atol=1e-5, rtol=1e-4)


@every_plan
@torch.no_grad()
def test_features_as_in_timm(plan):
    dense = small()
    model = amod.convert(dense, plan=plan)
    tokens = model.forward_features(IMAGES)
    assert tokens.shape[::2] == (3, 32)
    assert torch.equal(model.forward_head(tokens), model(IMAGES))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    for options in (
        {"indices": 2},
        {"indices": [1, 4], "norm": True, "stop_early": True, "intermediates_only": True},
        {"indices": [0, 5], "return_prefix_tokens": True, "output_fmt": "NLC"},
        {"output_dict": True, "norm": True},
    ):
        ours, timms = model.forward_intermediates(IMAGES, **options), dense.forward_intermediates(IMAGES, **options)
        if isinstance(ours, dict):
            ours, timms = ((found.pop("image_features"), found["image_intermediates"]) for found in (ours, timms))
        if isinstance(ours, tuple):
            assert torch.equal(ours[0], tokens)
            ours, timms = ours[1], timms[1]
        flat, expected = (torch.utils._pytree.tree_flatten(found) for found in (ours, timms))
        assert flat[1] == expected[1]
        assert [t.shape for t in flat[0]] == [t.shape for t in expected[0]]
    # the first block is whole in every plan
    first = {"indices": [0], "intermediates_only": True}
    assert_close(model.forward_intermediates(IMAGES, **first), dense.forward_intermediates(IMAGES, **first))
    last = model.forward_intermediates(IMAGES, norm=True, output_fmt="NLC", return_prefix_tokens=True)
    assert_close(last[1][-1][1], last[0][:, :1])


@every_plan
@torch.no_grad()
def test_changing_head_and_size_as_in_timm(plan):
    model = amod.convert(small(), plan=plan)
    model.reset_classifier(0)
    assert model(IMAGES).shape == (3, 32)
    assert torch.equal(model(IMAGES), model.forward_features(IMAGES)[:, 0])
    model.reset_classifier(7)
    model.set_input_size((48, 48))
    larger = torch.randn(2, 3, 48, 48)
    assert model(larger).shape == (2, 7)
    assert model.tokens_kept(37) == {layer.layer: n for layer, n in zip(
        model(larger, return_routing=True)[1], model.tokens_kept(37).values(), strict=True)}  # fmt: skip
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert max(model.plan) <= 2 < len(model.blocks) + 1
    assert model.forward_intermediates(larger, [0, 2], intermediates_only=True)[-1].shape == (2, 32, 6, 6)


def test_no_classes_and_no_images():
    model = amod.convert(small(num_classes=0), "attention", 0.4)
    assert model(IMAGES).shape == (3, 32)
    for plan in PLANS.values():
        assert amod.convert(small(), plan=plan)(IMAGES[:0]).shape == (0, 5)


@every_plan
def test_functional_call_derivatives_and_batches(plan):
    """As for the dense model with unfused attention: torch.func has no rule for the fused one."""
    dense = small()
    for block in dense.blocks:
        block.attn.fused_attn = False
    model = amod.convert(dense, plan=plan)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    changed = {**parameters, "head.bias": parameters["head.bias"] + 1}
    assert_close(torch.func.functional_call(model, changed, (IMAGES,)), model(IMAGES) + 1)
    exact, at, tangent, step = copy.deepcopy(model).double(), IMAGES.double(), torch.randn_like(IMAGES).double(), 1e-6
    _, derivative = torch.func.jvp(exact, (at,), (tangent,))
    assert_close(
        derivative, (exact(at + step * tangent) - exact(at - step * tangent)) / (2 * step), atol=1e-5, rtol=1e-4
    )
    alone = torch.func.vmap(lambda image: model(image[None])[0])(IMAGES)
    assert_close(alone, model(IMAGES), atol=1e-5, rtol=1e-4)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IMAGES,)).square().sum())(parameters)
    assert gradients["blocks.0.attn.qkv.weight"].abs().sum() > 0


@every_plan
def test_on_the_meta_device(plan):
    with torch.device("meta"):
        model = amod.convert(timm.create_model("deit_tiny_patch16_224", depth=6), plan=plan)
        assert model(torch.empty(2, 3, 224, 224)).is_meta


@every_plan
def test_threads_do_not_disturb_each_other(plan):
    """One model served to several threads: nothing of a call is kept on a module."""
    model = amod.convert(small(), plan=plan)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(8)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        found = {}

        def serve(i):
            with torch.no_grad():
                for _ in range(10):
                    found.setdefault(i, []).append(model(batches[i]))

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        assert all(torch.equal(out, expected[i]) for out in found[i])


@every_plan
def test_accelerate_moves_weights_in_and_out_of_each_block(plan, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = amod.convert(small(), plan=plan)
    expected = model(IMAGES).detach()
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.blocks[2].mlp.fc1.weight.is_meta
    with torch.no_grad():
        assert_close(model(IMAGES), expected, atol=1e-5, rtol=1e-4)


def test_distributed_checkpoint_of_a_routed_model_loads_into_timms_and_back(tmp_path):
    dense = small()
    model = amod.convert(small(), "attention", 0.4)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "a", no_dist=True)
    state = {"model": dense.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "a", no_dist=True)
    assert all(torch.equal(state["model"][key], value) for key, value in model.state_dict().items())


FSDP = """
import torch, torch.distributed as dist
from timm.models.vision_transformer import Block
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
import amod, test_ecosystem
from test_vit import IMAGES, small
dist.init_process_group("gloo")
for name in ("attention", "few merges"):
    for kind in (1, 2):
        torch.manual_seed(0)
        model = amod.convert(small(), plan=test_ecosystem.PLANS[name]).train()
        expected = model(IMAGES).detach()
        if kind == 1:
            wrap = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "device_id": torch.device("cpu")}
            model = FullyShardedDataParallel(model, use_orig_params=True, **wrap)
        else:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        out = model(IMAGES)
        torch.testing.assert_close(out.detach(), expected, atol=1e-5, rtol=1e-4)
        out.square().sum().backward()
        without = [name for name, p in model.named_parameters() if p.numel() and p.grad is None]
        assert not without, without
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not torch.allclose(model(IMAGES), expected)
print("same")
dist.destroy_process_group()
"""


def test_fsdp_per_block_in_two_processes(tmp_path):
    """FSDP 1 and 2, each block a unit of its own: the outputs, a gradient everywhere, a step that acts."""
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", str(script)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": "src:tests", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.count("same") == 2, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timm.create_model("naflexvit_base_patch16_gap"), "timm's NaFlexVit cannot be routed"),
        (lambda: timm.create_model("hiera_tiny_224"), "timm's Hiera cannot be routed: its blocks pool"),
        (lambda: timm.create_model("cait_xxs24_224"), "timm's Cait"),
        (lambda: timm.create_model("xcit_nano_12_p16_224"), "timm's Xcit"),
        (lambda: timm.create_model("samvit_base_patch16_224"), "timm's VisionTransformerSAM"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "timm's SwinTransformer"),
        (lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256"), "Block with DiffAttention"),
        (lambda: __import__("torchvision").models.vit_b_16(), "torchvision's VisionTransformer.*not timm's"),
        (lambda: nn.Linear(2, 2), "torch's Linear cannot be routed"),
    ],
)
def test_what_is_not_served_is_refused_by_module_class_and_reason(make, words):
    with torch.device("meta"):
        model = make()
    with pytest.raises(amod.UserError, match=words) as error:
        amod.convert(model)
    assert "\n" not in str(error.value)


ISOTROPIC = ("beit", "cait", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid",
             "vision_transformer_relpos", "vision_transformer_sam", "xcit")  # fmt: skip


SERVED = {"linear": 279, "attention": 270, "merge": 270, "tuning": 266, "evit": 249, "dynamicvit": 131, "avit": 129}
"""How many names of timm 1.0.31 each method takes; the README says so."""


def is_served(vit, router, seen):
    """Whether it converts and, with attention or linear routing and for the first of its kind, runs."""
    try:
        if router not in ("attention", "linear"):
            check_model(vit)
            check_blocks(vit, make_plan(len(vit.blocks), router, placement=None if router == "avit" else [1]))
            return True
        model = amod.convert(vit, router, 0.5, [1])
    except amod.UserError:
        return False
    kind = tuple(type(module) for module in model.modules())
    if kind not in seen:
        assert amod.count_flops(model) > 0
        seen.add(kind)
    return True


def test_how_many_of_timms_isotropic_transformers_are_served(monkeypatch):
    """All names of these modules of timm, two blocks deep, on the meta device. The README states the counts."""
    monkeypatch.setattr(timm.models.VisionTransformer, "init_weights", lambda *_, **__: None)  # half of the time
    names = [name for m in ISOTROPIC for name in timm.list_models(module=m)]
    counts, seen = Counter(), set()
    for name in names:
        with torch.device("meta"):
            try:
                vit = timm.create_model(name, depth=2)
            except Exception:  # not every entry point takes a depth
                vit = timm.create_model(name)
        counts.update(router for router in SERVED if is_served(vit, router, seen))
    if timm.__version__ == "1.0.31":
        assert (dict(counts), len(names)) == (SERVED, 335)
    assert counts["attention"] > 0.75 * len(names)
