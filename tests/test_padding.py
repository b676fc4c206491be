"""Numbers worked out by hand."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

import amod
from amod.padding import choose, counts, first_of, mask_among, mean_of_real_rows, real_tokens, refine_among
from amod.padding import without_fillers as shown

REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
SCORES = torch.tensor([[0.1, 0.3, 0.1, 0.4, 0.1], [9.0, 9.0, 0.2, 0.8, 9.0]])


def test_padding_is_what_does_not_see_itself():
    columns = REAL[:, None, None, :].expand(2, 1, 5, 5)
    window = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    numbers = torch.zeros(2, 1, 5, 5).masked_fill(~columns, torch.finfo(torch.float32).min)
    for mask in (columns, columns & window, numbers):
        assert torch.equal(real_tokens(mask, 2), REAL)
    assert torch.equal(real_tokens(columns[:1], 3), REAL[:1].expand(3, 5))


def test_each_text_keeps_its_share_and_at_least_one():
    assert counts(REAL, 0.5, 1).tolist() == [2, 1]  # 2.5 and 1
    assert counts(REAL, 0.6, 1).tolist() == [3, 1]  # 3 and 1.2
    assert counts(REAL, 0.1, 2).tolist() == [2, 2]
    assert counts(torch.zeros(1, 5, dtype=torch.bool), 0.5, 1).tolist() == [0]
    assert counts(torch.ones(1, 100, dtype=torch.bool), 0.29, 1).tolist() == [29]


def test_each_texts_share_is_the_share_of_route():
    real = torch.ones(700, 700, dtype=torch.bool).tril()
    for capacity in (1 / 3, 0.29, 0.07, 0.125, 1 / 7, 0.999999999, 1.0):
        found = counts(real, capacity, 0).tolist()
        assert found == [amod.Route(capacity).kept(n) if capacity * n >= 1 else 0 for n in range(1, 701)]
        assert found == [math.floor(round(capacity * n, 9)) for n in range(1, 701)]


def test_padding_is_chosen_last_and_is_a_filler():
    indices, among = choose(SCORES, REAL, 3, torch.tensor([3, 1]))
    assert indices.tolist() == [[0, 1, 3], [0, 2, 3]]  # of equals the earlier; of text 1: 3, then 2, then padding
    assert among.tolist() == [[True, True, True], [False, False, True]]
    assert shown(indices, among).tolist() == [[0, 1, 3], [3, 3, 3]]
    indices, among = choose(SCORES, REAL, 2, torch.tensor([2, 1]), prefix=1)
    assert indices.tolist() == [[0, 3], [2, 3]]  # text 1 begins at 2
    assert among.tolist() == [[True, True], [True, False]]


def test_nobody_sees_a_filler_and_no_row_is_empty():
    for mask in (torch.ones(1, 1, 3, 3).bool(), torch.zeros(1, 1, 3, 3)):
        seen = mask_among(mask, torch.tensor([[True, False, True]]))
        seen = seen if seen.dtype == torch.bool else seen == 0
        assert seen[0, 0].int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_the_mean_is_over_real_rows():
    rows = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]])
    real = torch.tensor([[True, True, False]])
    assert_close(mean_of_real_rows(rows.mean(dim=1), real), torch.tensor([[0.375, 0.625, 0.0]]))


def test_fillers_keep_the_score_they_had():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    indices, among = torch.tensor([[0, 1, 3]]), torch.tensor([[True, False, True]])
    refined = refine_among(scores, indices, torch.tensor([[0.8, 0.0, 0.2]]), among)
    assert_close(refined, torch.tensor([[0.4, 0.2, 0.3, 0.1]]))  # 0.1 + 0.4 shared 4 to 1
    for row, expected in ((0, refined), (1, scores), (2, scores)):  # 1 is a filler, 2 was skipped
        left = refine_among(scores, indices, torch.tensor([[0.8, 0.0, 0.2]]), among, torch.tensor([[row]]))
        assert_close(left, expected)


def test_where_texts_begin():
    assert first_of(REAL).tolist() == [0, 2]
