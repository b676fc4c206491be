from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from timm.layers import Attention

from amod import attention
from amod.attention import ReadableAttention, Request, attend, class_scores, column_mean, explicit, tiled_attention
from amod.dress import dress


def readable(*args, **kwargs):
    attn = Attention(*args, **kwargs)
    dress(attn, ReadableAttention)
    return attn


def ask(attn, x, want="column_mean", **asked):
    """The attention's output, and what it leaves of ``want``."""
    request = Request(want=(want,), **asked)
    return attn(x, attn_mask=request), request.left[want]


def reference_of(q, k, v, bias=None):
    output, maps = explicit(q, k, v, bias)
    return output, maps.mean(dim=(1, 2))


def qkv(b, h, n, d, **kwargs):
    return torch.randn(b, n, 3, h, d, **kwargs).permute(2, 0, 3, 1, 4).unbind(0)


def test_eq_3_and_4_by_hand():
    """2 heads, 4 tokens, head width 1, so that exp(q k) is a power of two and every row sums by eye."""
    log2 = torch.log(torch.tensor(2.0))
    # head 0: q = (log 2, 0, 0, 0), k = (1, 0, 0, 0): row 0 is 2:1:1:1, the others are even
    # head 1: q = (0, 0, 0, log 2), k = (0, 0, 0, 2): row 3 is 1:1:1:4, the others are even
    q = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 1.0]]]).unsqueeze(-1) * log2
    k = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 2.0]]]).unsqueeze(-1)
    v = torch.ones(1, 2, 4, 1)
    # column sums: head 0: 2/5 + 3/4, then 1/5 + 3/4 three times; head 1: 1/7 + 3/4 three times, then 4/7 + 3/4
    head0 = torch.tensor([0.4 + 0.75, 0.95, 0.95, 0.95])
    head1 = torch.tensor([1 / 7 + 0.75, 1 / 7 + 0.75, 1 / 7 + 0.75, 4 / 7 + 0.75])
    expected = ((head0 + head1) / 8).unsqueeze(0)
    for scores in (reference_of(q, k, v)[1], tiled_attention(q, k, v)[1], column_mean(q, k)):
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(1))


@pytest.mark.parametrize("tile", [1, 4096, 1 << 16, 1 << 20])
@pytest.mark.parametrize("shape", [(5, 3, 50, 16), (1, 2, 197, 64), (3, 1, 7, 8), (2, 4, 300, 8)])
def test_tiles_of_any_size_give_the_explicit_map(shape, tile, monkeypatch):
    """Tiles of several samples, of heads and of rows, with a remainder in each."""
    monkeypatch.setattr(attention, "SAMPLE_BYTES", tile)
    monkeypatch.setattr(attention, "TILE_BYTES", 2 * tile)
    q, k, v = qkv(*shape)
    b, h, n, _ = shape
    for bias in (None, torch.randn(b, 1, 1, n), torch.randn(1, h, n, n)):
        output, scores = reference_of(q, k, v, bias)
        asked = attend(q, k, v, bias, Request(want=("column_mean",)), torch.nn.Identity())
        for mine in (tiled_attention(q, k, v, bias), (asked[0], asked[1]["column_mean"])):
            torch.testing.assert_close(mine[0], output, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mine[1], scores, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(column_mean(q, k, bias), scores, atol=1e-6, rtol=1e-5)


def test_scores_against_the_sum_written_out():
    attn = readable(32, num_heads=4, qkv_bias=True).eval()
    x = torch.randn(3, 9, 32)
    with torch.no_grad():
        output, scores = ask(attn, x)
        torch.testing.assert_close(output, Attention.forward(attn, x), atol=1e-6, rtol=1e-5)
        q, k, _ = attn.qkv(x).view(3, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
        for b in range(3):
            maps = []
            for h in range(4):
                logits = torch.exp(q[b, h] @ k[b, h].T / 8**0.5)
                maps.append(logits / logits.sum(dim=1, keepdim=True))
            expected = [sum(maps[h][i, j] for h in range(4) for i in range(9)) / (4 * 9) for j in range(9)]
            torch.testing.assert_close(scores[b], torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n", [40, 150])  # on either side of EXPLICIT_TOKENS
def test_training_has_timms_gradient_and_none_through_the_scores(n):
    attn = readable(24, num_heads=3, qk_norm=True, norm_layer=torch.nn.LayerNorm, qkv_bias=True)
    x = torch.randn(2, n, 24)
    output, scores = ask(attn, x)
    assert not scores.requires_grad
    output.square().sum().backward()
    mine = {name: p.grad.clone() for name, p in attn.named_parameters()}
    attn.zero_grad()
    attn(x).square().sum().backward()
    for name, p in attn.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_gradient_through_the_scores_where_it_is_asked_for():
    for want in ("column_mean", "class_attention", "class_attention_value"):
        attn = readable(16, num_heads=2)
        scores = ask(attn, torch.randn(1, 150, 16), want, differentiable=True)[1]
        scores[0, 3].backward()
        assert attn.qkv.weight.grad[:32].abs().sum() > 0


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_class_attention_is_a_row_of_the_map_or_the_mean_querys(class_token, fused):
    attn = readable(32, num_heads=4).eval()
    attn.fused_attn = fused
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        output, row = ask(attn, x, "class_attention", class_token=class_token)
        torch.testing.assert_close(output, Attention.forward(attn, x), atol=1e-6, rtol=1e-5)
        q, k, _ = attn.qkv(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
        if class_token:
            expected = torch.einsum("bhd,bhjd->bhj", q[:, :, 0], k).div(8**0.5).softmax(-1).mean(1)
        else:
            expected = torch.einsum("bhd,bhjd->bhj", q.mean(2), k).div(8**0.5).softmax(-1).mean(1)
    torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("map_at_hand", [True, False])
def test_class_attention_times_the_values_by_hand(map_at_hand):
    """Two heads, three tokens: rows (.5 .25 .25) and (.25 .25 .5), norms of the values (1 2 4) and (2 0 1)."""
    log = torch.tensor([[[[2.0, 1.0, 1.0]], [[1.0, 1.0, 2.0]]]]).log()
    q, k = torch.ones(1, 2, 3, 1), log.transpose(2, 3)  # the logits are the keys themselves
    v = torch.tensor([[[[1.0, 0], [0, -2], [4, 0]], [[0, 2], [0, 0], [0.6, 0.8]]]])
    request = Request(want=("class_attention", "class_attention_value"))
    row = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]) if map_at_hand else None
    left = class_scores(q, k, v, None, request, row)
    torch.testing.assert_close(left["class_attention"], torch.tensor([[0.375, 0.25, 0.375]]))
    # (.5 1 + .25 2, .25 2 + .25 0, .25 4 + .5 1) = (1, .5, 1.5), of 3
    torch.testing.assert_close(left["class_attention_value"], torch.tensor([[1.0, 0.5, 1.5]]) / 3)
    assert class_scores(q, k, v, None, Request(want=("keys",)), row) == {}


def test_one_query_is_that_row_of_the_whole():
    attn = readable(32, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).eval()
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        alone = attn(x, attn_mask=Request(rows=2))
    torch.testing.assert_close(alone, Attention.forward(attn, x)[:, :2], atol=1e-6, rtol=1e-5)


def test_without_a_request_it_is_timms_own_forward():
    attn, x = readable(32, num_heads=4).eval(), torch.randn(2, 9, 32)
    mask = torch.randn(9, 9)
    assert torch.equal(attn(x), Attention.forward(attn, x))
    assert torch.equal(attn(x, mask), Attention.forward(attn, x, mask))


def test_where_fused_attention_is_off_hooks_see_the_map():
    """timm's AttentionExtract reads the outputs of ``attn_drop``."""
    attn, x, seen = readable(32, num_heads=4).eval(), torch.randn(2, 9, 32), []
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    _, scores = ask(attn, x)
    torch.testing.assert_close(seen[0].mean(dim=(1, 2)), scores)


def test_scores_are_float32_under_autocast():
    attn = readable(32, num_heads=2).eval()
    x = torch.randn(2, 60, 32)
    with torch.no_grad():
        exact = ask(attn, x)[1]
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                output, scores = ask(attn, x)
            assert output.dtype == dtype
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, exact, atol=1e-4, rtol=2e-2)
            torch.testing.assert_close(scores.sum(dim=1), torch.ones(2), atol=1e-6, rtol=0)


def test_dropout_acts_on_the_output_and_not_on_the_scores():
    torch.manual_seed(0)
    attn = readable(16, num_heads=2, attn_drop=0.5)
    x = torch.randn(1, 20, 16)
    a, b = ask(attn, x), ask(attn, x)
    assert not torch.allclose(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


def test_extra_memory_is_far_below_a_map():
    """2,000 tokens, 4 heads: the map is 64 MB, a tile 2 MB a thread."""
    torch.set_num_threads(1)
    q, k, v = qkv(1, 4, 2000, 8)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        attend(q, k, v, None, Request(want=("column_mean",)), torch.nn.Identity())
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4e6


def test_the_triton_kernel_in_its_interpreter():
    """In a process of its own: the interpreter is chosen when Triton is imported. bf16 is beyond its dot."""
    pytest.importorskip("triton")
    script = """
import torch
from amod.attention import explicit
from amod.kernels import triton_column_mean
for b, h, n, d, dtype, tolerance in [(2, 3, 70, 24, torch.float32, 1e-6), (1, 2, 130, 16, torch.float16, 1e-5)]:
    q, k, v = torch.randn(b, n, 3, h, d).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    scores = triton_column_mean(q, k)
    torch.testing.assert_close(scores, explicit(q, k, v)[1].mean(dim=(1, 2)), atol=tolerance, rtol=1e-4)
    assert scores.dtype == torch.float32
print("same")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "same", result.stderr
