"""A gated layer of a causal language model: what its gate skips is not computed, in batches and with a cache.

    x' = x + g attention(norm(x)),  x'' = x' + mlp(norm(x'))        skip=attention (MindSkip); mlp and block alike

Whose keys and values there are, is ``Gate.cache``: ``kept``: a skipped token leaves none, so later tokens see kept ones
only; ``all``: every token has them, and only query, scores and output are skipped. Training multiplies the same
function by its gates. Rotary positions stay those of the text in either case. A gate per token is causal; one per
sequence is decided on the first tokens that a cache sees, the prompt, and stays.

Nothing is kept on a module: what a pass leaves for the next one is in the cache that generate() hands through.
Axes: B texts, Q tokens of this call, K the most that any text keeps, T cached, H heads, D width, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from amod import padding
from amod.dress import Dressed
from amod.entries import Gate
from amod.errors import UserError
from amod.gates import kept_first, put_kept, straight_through
from amod.huggingface_walk import Walk, reentrant, refuse_part
from amod.routers import GateRouter
from amod.routing import RoutedLayer, take


class KeptCache(DynamicLayer):
    """A layer's keys and values (B, H, T, d) of the tokens that have some, packed to the left: T is the most of any
    text. ``positions`` (B, T) are their columns in the text, -1 where a text has fewer."""

    is_croppable = False

    keys: Any
    values: Any

    def __init__(self, before: Any = None) -> None:
        super().__init__()
        self.seen = 0
        self.window = getattr(before, "sliding_window", None)
        self.is_sliding = self.window is not None
        self.positions = torch.empty(0)
        self.open: Tensor | None = None  # (B, 1), of gates per sequence; nan: not decided, for want of a real token

    def add(
        self, keys: Tensor, values: Tensor, positions: Tensor, texts: Tensor, batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All keys, values and positions, with these (b, H, K, d), (b, K) of ``texts`` (b,) behind what each had.

        Kept of them is what a later token can see: of a sliding window, no more than the window."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = (t.new_zeros(batch, t.shape[1], 0, t.shape[3]) for t in (keys, values))
            self.positions = positions.new_zeros(batch, 0)
        of, at = (positions >= 0).nonzero(as_tuple=True)
        row, had = texts[of], (self.positions >= 0).sum(dim=1)
        room = max(0, int((had[texts] + (positions >= 0).sum(dim=1)).max()) - self.positions.shape[1])
        to = had[row] + ((positions >= 0).cumsum(dim=1) - 1)[of, at]
        self.positions = F.pad(self.positions, (0, room), value=-1).index_put((row, to), positions[of, at])
        self.keys, self.values = (
            F.pad(old, (0, 0, 0, room)).transpose(1, 2).index_put((row, to), fresh.transpose(1, 2)[of, at])
            .transpose(1, 2)
            for old, fresh in ((self.keys, keys), (self.values, values))
        )  # fmt: skip
        found = self.keys, self.values, self.positions
        if self.window is not None:
            gone = ((self.positions >= 0) & (self.positions <= self.seen - self.window)).sum(dim=1, keepdim=True)
            left = int(((self.positions >= 0).sum(dim=1, keepdim=True) - gone).max())
            if left < self.positions.shape[1]:  # each text's own to the left
                columns = gone + torch.arange(left, device=gone.device)
                beyond, columns = columns >= self.positions.shape[1], columns.clamp(max=self.positions.shape[1] - 1)
                self.positions = self.positions.gather(1, columns).masked_fill(beyond, -1)
                self.keys, self.values = (take(t.transpose(1, 2), columns).transpose(1, 2) for t in found[:2])
        return found

    def update(self, *_: Any, **__: Any) -> Any:
        raise UserError("this cache is of a gated model; give the dense model a new one")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the layer that this one replaced, whose mask other layers share."""
        if self.window is None:
            return self.seen + query_length, 0
        return min(self.seen, self.window - 1) + query_length, max(self.seen - self.window + 1, 0)

    def get_max_length(self) -> int:
        return self.window or -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError("crop: what a gated layer has seen cannot be taken back; use no assisted decoding")

    def reset(self) -> None:
        super().reset()
        self.seen, self.open = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        texts = len(self.positions if self.open is None else self.open)
        self.batch_select_indices(torch.arange(texts).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in ("keys", "values", "positions", "open") if self.is_initialized else ("open",):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[indices.to(value.device)])


def decided(before: Tensor | None, now: Tensor, real: Tensor) -> Tensor:
    """Gates per sequence (B, 1): a text's is decided by the first of its tokens that come, real (B, N), and stays."""
    now = now.masked_fill(~real.any(dim=1, keepdim=True), torch.nan)
    return now if before is None else torch.where(before.isnan(), now, before)


class GatedLayer(Dressed):
    """Over the class of a decoder layer."""

    named_alike = True
    adds = ("entry", "router")
    entry: Gate
    router: GateRouter
    self_attn: Any
    mlp: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        position_embeddings: Any = None,
        walk: Walk | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        refuse_part(self, kwargs)
        x, entry, skip = hidden_states, self.entry, self.entry.skip
        learning = self.training and torch.is_grad_enabled()  # all is computed, and multiplied by the gate
        self.refuse(cache, x.shape[1], learning, walk is not None)
        if x.is_meta:
            raise UserError("count_flops: what a trained gate costs depends on the text; give token ids (B, N)")
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
            raise UserError(
                f"attn_implementation={self.self_attn.config._attn_implementation}: its mask is of its own kind, and a "
                "gated layer reads masks (B, 1, Q, N); call model.set_attn_implementation with 'sdpa' or 'eager'"
            )
        if attention_mask is not None:  # (B, 1, 1, N) says of every row the same; its last columns are of these tokens
            attention_mask = attention_mask.expand(*attention_mask.shape[:2], x.shape[1], -1)
            real = padding.real_tokens(attention_mask[..., -x.shape[1] :], len(x))
        store = None if cache is None or learning else self.store(cache, x.shape[1])
        before = self.input_layernorm(x)  # type: ignore[operator]
        if skip == "mlp":
            x = self.attended(x, before, real, real, attention_mask, store, position_embeddings, None)[0]
        normed = self.mlp_norm(x) if skip == "mlp" else before
        logits = self.router(normed, real)
        gate = straight_through(logits)
        if store is not None and entry.per == "sequence":
            store.open = decided(store.open, gate.detach(), real)
            gate = store.open.nan_to_num()
        if walk is not None:
            scores = logits.detach().expand(x.shape[:2])
            none = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
            walk.routing[self.self_attn.layer_idx] = RoutedLayer(
                self.self_attn.layer_idx, scores, none, None, gate, None if attention_mask is None else real
            )
        keep, rows = (gate.detach() > 0) & real, gate.to(x.dtype) if learning else None
        if skip != "mlp":
            seen = keep if entry.cache == "kept" else real
            after, keep_all = self.attended(x, normed, keep, seen, attention_mask, store, position_embeddings, rows)
            if skip == "attention":
                return after + self.mlp_update(after)
            if keep_all is not None and rows is not None:  # the block's update is multiplied as a whole
                return x + rows.unsqueeze(-1) * (keep_all + self.mlp_update(x + keep_all))
            x, normed = after, None
        if rows is not None:
            return x + rows.unsqueeze(-1) * self.mlp_update(x, normed)
        known = None if normed is None else normed[keep]
        return x.index_put((keep,), x[keep] + self.mlp_update(x[keep], known))

    def attended(
        self,
        x: Tensor,
        normed: Tensor,
        keep: Tensor,
        seen: Tensor,
        mask: Tensor | None,
        store: KeptCache | None,
        rotary: tuple[Tensor, Tensor],
        gate: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x with the attention's update of the tokens in ``keep`` (B, Q), which look at those in ``seen`` (B, Q).

        Texts that keep no token are left out whole: those whose gate is shut, and when decoding most of them.

        Args:
            mask: the model's, (B or 1, 1, Q, columns), whose last column is of the last of these tokens.
            gate: (B, Q) or (B, 1), in training: all tokens ask, and their update is multiplied by it.
        Returns:
            (B, Q, D), and in training the update before it was multiplied.
        """
        attn, first = self.self_attn, 0 if store is None else store.seen
        if store is not None:
            store.seen += x.shape[1]
        ask, show = (keep, seen) if gate is None else (torch.ones_like(keep), torch.ones_like(seen))
        askers, holders = (some.any(dim=1).nonzero()[:, 0] for some in (ask, show))
        if not len(holders):  # and nobody asks: who asks is seen
            return x, None
        shown, there = kept_first(show[holders])
        known = take(normed[holders], shown)
        keys = self.rotated(attn.k_proj(known), rotary, holders, shown, "k_norm")
        values = attn.v_proj(known).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        positions = (shown + first).masked_fill(~there, -1)
        if store is not None:
            keys, values, positions = store.add(keys, values, positions, holders, len(x))
        if not len(askers):
            return x, None
        if len(askers) < len(keys):
            at = askers if len(keys) == len(x) else torch.searchsorted(holders, askers)
            keys, values, positions = keys[at], values[at], positions[at]
        asking, among = kept_first(ask[askers])
        query = self.rotated(attn.q_proj(take(normed[askers], asking)), rotary, askers, asking, "q_norm")
        column, row = positions[:, None, :], (asking + first)[:, :, None]
        causal = column <= row
        window = getattr(attn, "sliding_window", getattr(attn.config, "sliding_window", None))
        if window is not None:
            causal &= column > row - window
        bias = torch.zeros(causal.shape, dtype=x.dtype, device=x.device)
        if mask is None:
            visible = causal
        else:  # it says who is seen: by image tokens those behind them, too; of texts packed in a row one's own
            columns = column - (first + x.shape[1] - mask.shape[-1])
            said = mask[:, 0].expand(len(x), -1, -1)[askers[:, None, None], asking[:, :, None], columns.clamp(min=0)]
            if said.dtype == torch.bool:
                visible = torch.where(columns < 0, causal, said)
            else:
                visible, bias = (columns >= 0) | causal, torch.where(columns < 0, bias, said.to(bias))
        visible = visible & (column >= 0)
        if gate is not None:  # a skipped token sees itself too: its gate learns from an update that means something
            visible &= take(seen, shown)[:, None, :] | (column == row)
        bias = bias.masked_fill(~visible, torch.finfo(x.dtype).min).unsqueeze(1)  # finite: no row becomes nan
        groups = query.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (keys, values))
        drop = attn.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, keys, values, bias, dropout_p=drop, scale=attn.scaling)
        update = attn.o_proj(out.transpose(1, 2).flatten(2))
        if hasattr(self, "pre_feedforward_layernorm"):
            update = self.post_attention_layernorm(update)  # type: ignore[operator]
        if gate is not None:
            return x + gate.unsqueeze(-1) * update, update
        some = x[askers]
        return x.index_copy(0, askers, put_kept(some, asking, among, take(some, asking) + update)), None

    def rotated(self, heads: Tensor, rotary: tuple[Tensor, Tensor], texts: Tensor, at: Tensor, norm: str) -> Tensor:
        """(b, K, H d) of the tokens ``at`` (b, K) of ``texts`` -> (b, H, K, d), turned, normed where the model does."""
        heads = heads.unflatten(-1, (-1, self.self_attn.head_dim))
        if hasattr(self.self_attn, norm):
            heads = getattr(self.self_attn, norm)(heads)
        heads = heads.transpose(1, 2)
        tables = (table[texts] if len(table) > 1 else table.expand(len(at), -1, -1) for table in rotary)
        cos, sin = (take(table, at).unsqueeze(1) for table in tables)
        one, other = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-other, one], dim=-1) * sin

    def mlp_norm(self, x: Tensor) -> Tensor:
        own: Any = getattr(self, "pre_feedforward_layernorm", None) or self.post_attention_layernorm
        return own(x)

    def mlp_update(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        update = self.mlp(self.mlp_norm(x) if normed is None else normed)
        after: Any = getattr(self, "post_feedforward_layernorm", None)
        return update if after is None else after(update)

    def refuse(self, cache: Any, count: int, learning: bool, asked: bool) -> None:
        """UserError for what would be wrong with ``count`` tokens: a past that is not seen, gates without gradients."""
        if asked and reentrant(self):
            raise UserError(
                "gradient_checkpointing_enable: use_reentrant=True leaves the gates without a gradient; leave it out"
            )
        if learning and self.others_have_seen_more(cache, count):
            raise UserError("a gated model that is trained reads whole texts and no cache; eval(), or torch.no_grad()")

    def others_have_seen_more(self, cache: Any, count: int) -> bool:
        """Than these ``count`` tokens, which the layers before have in the cache already."""
        i = self.self_attn.layer_idx
        layers = enumerate(getattr(cache, "layers", ()))
        return any(layer.get_seq_length() > count * (j < i) for j, layer in layers if j != i)

    def store(self, cache: Any, count: int) -> KeptCache:
        """This layer's place in the cache, into which ``count`` tokens come."""
        i = self.self_attn.layer_idx
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= i:
            cache.layers.append(cache.layer_class_to_replicate())
        own = cache.layers[i]
        if not isinstance(own, KeptCache):
            if not isinstance(own, DynamicLayer) or own.get_seq_length():
                raise UserError(f"cache: a gated layer needs an empty DynamicCache, not one with {type(own).__name__}")
            if self.others_have_seen_more(cache, count):
                raise UserError("cache: its text was read in training, where gated layers store nothing; read it again")
            own = cache.layers[i] = KeptCache(own)
        return own


def cache_bytes(cache: Any) -> int:
    """What a cache takes: keys, values, and of a gated layer what belongs to them."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "positions", "open")]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
