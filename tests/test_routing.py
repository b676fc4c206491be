from __future__ import annotations

import torch

from amod.routing import RoutedLayer, put, refine, take, top_k, weigh_update


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
    by_the_first = refine(scores.expand(2, 4), torch.tensor([[0, 3], [1, 3]]), torch.tensor([[0.25, 0.75]] * 2), row=0)
    torch.testing.assert_close(by_the_first, torch.stack([new[0], scores[0]]))  # in the second nobody asked
    everything = refine(scores, torch.arange(4)[None], torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(everything, torch.tensor([[0.1, 0.2, 0.3, 0.4]]))


def test_which_tokens_of_the_model_a_layer_keeps_by_hand():
    plain = RoutedLayer(3, None, torch.tensor([[0, 2]]))
    assert plain.tokens(4).tolist() == [[True, False, True, False]]
    # six tokens entered the model; 1 and 4 are gone, 2 and 3 are one token now, at position 1; position 2 is skipped
    owner = torch.tensor([[0, -1, 1, 1, -1, 2]])
    assert RoutedLayer(3, None, torch.tensor([[0, 1]]), owner).tokens(6).tolist() == [
        [True, False, True, True, False, False]
    ]
