from __future__ import annotations

import pytest
import torch

from amod.errors import UserError
from amod.placement import routed_blocks
from amod.routing import put, refine, take, tokens_kept, top_k, weigh_update


@pytest.mark.parametrize(
    ("capacity", "tokens", "kept"),
    [
        (0.125, 197, 24),  # 24.625
        (0.5, 197, 98),  # 98.5
        (0.125, 50, 6),  # 6.25
        (1, 197, 197),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
        (0.7, 10, 7),
        (1 / 197, 197, 1),
    ],
)
def test_tokens_kept_is_the_floor(capacity, tokens, kept):
    assert tokens_kept(capacity, tokens) == kept


@pytest.mark.parametrize("capacity", [0, -1, 2, 1.0001, float("nan"), float("inf"), "abc", None, True, 0.005])
def test_a_wrong_capacity_is_named(capacity):
    with pytest.raises(UserError, match="capacity=") as error:
        tokens_kept(capacity, 197)
    assert repr(capacity) in str(error.value)
    assert "\n" not in str(error.value)


def test_top_k_by_hand():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0.1, 0.3, 0.3, 0.3]])
    # highest two: 0.4 and 0.3; all equal: the first two; three equal: the first two of them
    assert top_k(scores, 2).tolist() == [[1, 3], [0, 1], [1, 2]]
    assert top_k(scores, 4).tolist() == [[0, 1, 2, 3]] * 3
    # position 0 is kept by right and counts among the two
    assert top_k(scores, 2, prefix=1).tolist() == [[0, 1], [0, 1], [0, 1]]
    assert scores[0, 0] == 0.1


def test_ties_keep_exactly_k_at_any_size():
    for n in (5, 197, 1024):
        assert top_k(torch.zeros(3, n), n // 2).tolist() == [list(range(n // 2))] * 3


def test_put_undoes_take_and_leaves_the_rest_bit_for_bit():
    x = torch.randn(3, 7, 5)
    indices = torch.tensor([[0, 2], [5, 6], [1, 4]])
    assert torch.equal(put(x, indices, take(x, indices)), x)
    changed = put(x, indices, torch.zeros(3, 2, 5))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[torch.arange(3)[:, None], indices] = True
    assert torch.equal(changed[~mask], x[~mask])
    assert changed[mask].abs().sum() == 0


def test_the_multiplier_acts_on_the_update_not_on_the_residual():
    before, after = torch.tensor([[[10.0, 20.0]]]), torch.tensor([[[11.0, 24.0]]])  # f(x) = (1, 4)
    assert weigh_update(before, after, torch.tensor([[0.5]])).tolist() == [[[10.5, 22.0]]]
    assert torch.equal(weigh_update(before, after, torch.tensor([[0.0]])), before)


def test_refine_by_hand():
    scores = torch.tensor([[0.4, 0.1, 0.2, 0.3]])
    # tokens 0 and 3 were seen: together 0.7, which their own map divides 1 : 3
    new = refine(scores, torch.tensor([[0, 3]]), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(new, torch.tensor([[0.175, 0.1, 0.2, 0.525]]))
    everything = refine(scores, torch.arange(4)[None], torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(everything, torch.tensor([[0.1, 0.2, 0.3, 0.4]]))


def test_placements():
    assert routed_blocks("alternate", 12, True) == (1, 3, 5, 7, 9, 11)
    assert routed_blocks("alternate", 7, True) == (1, 3, 5)
    assert routed_blocks("last8", 12, True) == (4, 6, 8, 10)
    assert routed_blocks([7, 1, 4], 12, True) == (1, 4, 7)
    assert routed_blocks([0, 1], 12, False) == (0, 1)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("altrnate", "'altrnate'.*alternate, last8"),
        ([0, 2], "block 0 has no block before it"),
        ([12], "12 is not one of 0 to 11"),
        ([-1], "-1 is not one of"),
        ([1, 1], "listed twice"),
        ([1.5], "1.5 is not one of"),
        ([True], "True is not one of"),
    ],
)
def test_wrong_placements_are_named(placement, words):
    with pytest.raises(UserError, match=words):
        routed_blocks(placement, 12, True)
