"""Leave-one-out importance: by hand, and against the obvious loop for every family."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from amod.analysis import importance
from amod.analysis.importance import cost, dense_walk, leave_one_out, patches_to_remove
from amod.errors import UserError
from families import PLAIN, build


class AddMean(nn.Module):
    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


class Toy(nn.Module):
    """Two blocks that add the mean of the tokens; the logits are the sum of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([AddMean(), AddMean()])
        self.norm = nn.Identity()

    def forward_head(self, x):
        return x.sum(dim=1)


def test_importance_of_three_tokens_by_hand():
    # A block doubles the tokens' sum. With z = second minus first logit, the loss of class 0 is ln(1 + e^z).
    # All tokens: z = 0, loss ln 2. At block 1 the tokens' own shares of z are -ln 2, 0, ln 2, doubled by one block:
    # without the first z = 2 ln 2, loss ln 5; without the third z = -2 ln 2, loss ln 5/4. From block 0 on: 4 ln 2.
    vit, ln2 = Toy(), math.log(2)
    x = torch.tensor([[[ln2, 0.0], [0.0, 0.0], [0.0, ln2]]])
    label, tokens = torch.tensor([0]), torch.tensor([[0, 1, 2]])
    at_block_1 = [math.log(5 / 2), 0.0, math.log(5 / 8)]
    at_block_0 = [math.log(17 / 2), 0.0, math.log(17 / 32)]
    torch.testing.assert_close(leave_one_out(vit, vit.blocks[0](x), label, 1, tokens), torch.tensor([at_block_1]))
    torch.testing.assert_close(leave_one_out(vit, x, label, 0, tokens), torch.tensor([at_block_0]))
    # the other class: the loss changes the other way round
    mirrored = leave_one_out(vit, x, torch.tensor([1]), 0, torch.tensor([[2, 1, 0]]))
    torch.testing.assert_close(mirrored, torch.tensor([at_block_0]))


def slowly(vit, images, labels, block, removed):
    """One image, one token at a time, in plain loops."""
    rows = []
    for image, label, positions in zip(images, labels, removed, strict=True):
        losses = []
        for j in [None, *positions.tolist()]:
            x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
            for i, b in enumerate(vit.blocks):
                if i == block and j is not None:
                    x = torch.cat([x[:, :j], x[:, j + 1 :]], dim=1)
                x = b(x)
            losses.append(-F.log_softmax(vit.forward_head(vit.norm(x)), dim=1)[0, label])
        rows.append([loss - losses[0] for loss in losses[1:]])
    return torch.tensor(rows)


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_every_family_agrees_with_the_loop(family, monkeypatch):
    vit, size = build(family)
    for name, parameter in vit.named_parameters():
        if name.startswith("head"):
            parameter *= 3  # of many patches one changes the loss by little
    images, labels = torch.randn(2, *size), torch.tensor([3, 5])
    last = len(vit.blocks) - 1
    walk = dense_walk(vit, images, [1, last])
    tokens = walk.inputs[1].shape[1]
    removed = patches_to_remove(2, tokens, vit.num_prefix_tokens, 3, torch.Generator().manual_seed(0))
    monkeypatch.setattr(importance, "CHUNK_ELEMENTS", 4 * walk.inputs[1][0].numel())  # two chunks of 4 and 2
    exact = copy.deepcopy(vit).double()
    for block in (1, last):
        found = leave_one_out(vit, walk.inputs[block], labels, block, removed)
        expected = slowly(exact, images.double(), labels, block, removed)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4, check_dtype=False)
        assert expected.abs().max() > 3e-5  # far above what float32 leaves


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_the_walk_is_the_dense_model(family):
    vit, size = build(family)
    images = torch.randn(2, *size)
    walk = dense_walk(vit, images, [1, 2])
    torch.testing.assert_close(walk.logits, vit(images), atol=2e-5, rtol=1e-4)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    _, decisions = reference.forward(vit, images, "attention", [1], x.shape[1])
    torch.testing.assert_close(walk.scores[1][0], decisions[1][0][1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(walk.inputs[1], vit.blocks[0](x), atol=1e-5, rtol=1e-4)
    assert walk.scores.keys() == {1, 2}


def test_a_family_whose_blocks_read_places_is_refused():
    vit, _ = build("dinov3")
    with pytest.raises(UserError, match="Eva: its blocks read where a token stands"):
        leave_one_out(vit, torch.zeros(1, 5, 32), torch.tensor([0]), 1, torch.tensor([[2]]))


def test_prefix_tokens_are_never_removed_and_each_patch_once():
    everything = patches_to_remove(2, 10, 3, None, torch.Generator().manual_seed(0))
    assert everything.tolist() == [list(range(3, 10))] * 2
    some = patches_to_remove(50, 10, 3, 4, torch.Generator().manual_seed(0))
    assert some.shape == (50, 4)
    assert some.min() == 3
    assert (some.diff(dim=1) > 0).all()
    assert torch.equal(some, patches_to_remove(50, 10, 3, 4, torch.Generator().manual_seed(0)))


def test_the_cost_is_what_runs():
    vit, size = build("deit")
    images, labels = torch.randn(2, *size), torch.tensor([3, 5])
    walk, ran = dense_walk(vit, images, [1, 3]), []
    removed = patches_to_remove(2, 17, 1, 5, torch.Generator())
    for block in (1, 3):
        leave_one_out(vit, walk.inputs[block], labels, block, removed, ran.append)
    assert sum(ran) == cost(4, [1, 3], 2, 5) == 2 * 5 * (3 + 1)
