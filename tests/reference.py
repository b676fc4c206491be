"""The obvious implementation: one image at a time, every map in memory, loops and masks. Slow and plain on purpose.

It reads the weights of a timm model and nothing else of this package; the tests compare the package with it.
"""

from __future__ import annotations

import math

import torch


def attention_map(attn, x):
    """(N, D) -> the map A (H, N, N) and the values (H, N, d). Eq. 3."""
    n = x.shape[0]
    q, k, v = attn.qkv(x).reshape(n, 3, attn.num_heads, attn.head_dim).unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    maps, values = [], []
    for h in range(attn.num_heads):
        logits = q[:, h] @ k[:, h].T / math.sqrt(attn.head_dim)
        maps.append(torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True))
        values.append(v[:, h])
    return torch.stack(maps), torch.stack(values)


def block_update(block, x):
    """f(x) of Eq. 2 for (N, D): the block's output less its input, and the map it used."""
    post = hasattr(block, "norm1") and not hasattr(block, "ls1")  # norm after the layer, as in ResPostBlock
    a, v = attention_map(block.attn, x if post else block.norm1(x))
    y = torch.cat([a[h] @ v[h] for h in range(len(a))], dim=1)
    y = block.attn.norm(y)
    if getattr(block.attn, "gate", None) is not None:
        y = y * torch.sigmoid(block.attn.gate(x if post else block.norm1(x)))
    y = block.attn.proj(y)
    x1 = x + (block.norm1(y) if post else block.ls1(y))
    y = block.mlp(x1 if post else block.norm2(x1))
    x2 = x1 + (block.norm2(y) if post else block.ls2(y))
    return x2 - x, a


def column_mean(a):
    """R_j = 1/(H N) sum_h sum_i A_h[i, j]. Eq. 4."""
    h, n, _ = a.shape
    return torch.tensor([sum(a[g, i, j] for g in range(h) for i in range(n)) / (h * n) for j in range(n)])


def keep(scores, k, prefix=0):
    """The first ``prefix`` tokens, then the highest scores, earlier tokens first among equals; ascending."""
    order = sorted(range(len(scores)), key=lambda j: (j >= prefix, -float(scores[j]), j))
    return sorted(order[:k])


def forward(vit, images, router, blocks, k, keep_prefix=False, weights=None, sigmoid=False):
    """Logits (B, classes) and, per routed block, the kept positions of each image and their scores."""
    prefix = vit.num_prefix_tokens if keep_prefix else 0
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    outputs, decisions = [], {i: [] for i in blocks}
    for x in tokens:
        left = None
        for i, block in enumerate(vit.blocks):
            if i not in blocks:
                update, a = block_update(block, x)
                left = column_mean_fast(a)
                x = x + update
                continue
            if router == "linear":
                scores = torch.stack([weights[i] @ token for token in x])
                scores = torch.sigmoid(scores) if sigmoid else scores
            else:
                scores = left
            kept = keep(scores, k, prefix)
            update, a = block_update(block, x[kept])
            new = x.clone()
            for row, j in enumerate(kept):
                r = scores[j] if router in ("linear", "attention_weighted") else 1.0
                new[j] = x[j] + r * update[row]
            x = new
            if left is not None:
                share, inner, left = sum(left[j] for j in kept), column_mean_fast(a), left.clone()
                for row, j in enumerate(kept):
                    left[j] = share * inner[row]
            decisions[i].append((kept, scores))
        outputs.append(vit.norm(x))
    return vit.forward_head(torch.stack(outputs)), decisions


def column_mean_fast(a):
    return a.mean(dim=(0, 1))
