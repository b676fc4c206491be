"""The scores of Eq. 4 on a GPU without the N x N map: two Triton kernels, no gradient.

R_j = 1/(H N) sum_h sum_i exp(s_h[i, j] - lse_h[i]),  s = q k^T / sqrt(d),  lse_i = log sum_j exp(s[i, j]).

The first kernel leaves lse (B, H, N); the second owns a block of columns j, goes through all heads and rows, and
writes R_j once: no atomics, so the result is the same every time. Extra memory is the lse, O(N) per head (A.8).
Everything is accumulated in float32. Tested in Triton's interpreter; never timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lse_kernel(
    q, k, lse, scale, n, d,
    q_b, q_h, q_n, k_b, k_h, k_n,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS query rows of one head of one sample."""
    head = tl.program_id(1)
    q += (head // H) * q_b + (head % H) * q_h
    k += (head // H) * k_b + (head % H) * k_h
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, D)
    queries = tl.load(q + i[:, None] * q_n + e[None, :], mask=(i[:, None] < n) & (e[None, :] < d), other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, n, COLS):
        j = start + tl.arange(0, COLS)
        keys = tl.load(k + j[:, None] * k_n + e[None, :], mask=(j[:, None] < n) & (e[None, :] < d), other=0.0)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s = tl.where(j[None, :] < n, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(s - new[:, None]), axis=1)
        top = new
    tl.store(lse + head * n + i, top + tl.log(total), mask=i < n)


@triton.jit
def _column_kernel(
    q, k, lse, out, scale, n, d,
    q_b, q_h, q_n, k_b, k_h, k_n,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program: COLS columns of one sample, over all its heads and rows."""
    b = tl.program_id(1)
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    e = tl.arange(0, D)
    total = tl.zeros([COLS], tl.float32)
    for h in range(0, H):
        keys = tl.load(
            k + b * k_b + h * k_h + j[:, None] * k_n + e[None, :],
            mask=(j[:, None] < n) & (e[None, :] < d),
            other=0.0,
        )
        for start in range(0, n, ROWS):
            i = start + tl.arange(0, ROWS)
            queries = tl.load(
                q + b * q_b + h * q_h + i[:, None] * q_n + e[None, :],
                mask=(i[:, None] < n) & (e[None, :] < d),
                other=0.0,
            )
            norm = tl.load(lse + (b * H + h) * n + i, mask=i < n, other=float("inf"))  # exp(-inf): no row
            s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            total += tl.sum(tl.exp(s - norm[:, None]), axis=0)
    tl.store(out + b * n + j, total / (H * n), mask=j < n)


def triton_column_mean(q: Tensor, k: Tensor, rows: int = 64, columns: int = 64) -> Tensor:
    """q, k (B, H, N, d) on a GPU (or, with TRITON_INTERPRET=1, on a CPU) -> scores (B, N) float32."""
    b, h, n, d = q.shape
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    lse = torch.empty(b, h, n, device=q.device, dtype=torch.float32)
    out = torch.empty(b, n, device=q.device, dtype=torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3])
    sizes = {"H": h, "D": max(16, triton.next_power_of_2(d)), "ROWS": rows, "COLS": columns}
    _lse_kernel[(triton.cdiv(n, rows), b * h)](q, k, lse, d**-0.5, n, d, *strides, **sizes)
    _column_kernel[(triton.cdiv(n, columns), b)](q, k, lse, out, d**-0.5, n, d, *strides, **sizes)
    return out
