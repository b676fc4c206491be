"""Every encoder of transformers' that ``amod.convert`` serves, small, and the obvious implementation of routing it.

The reference runs the dense model on one text or image alone, with eager attention, every map in memory and all tokens
in every layer; it uses nothing of this package. A routed layer's update of its kept tokens is what the whole layer
computes for them when nobody can see the others.
"""

from __future__ import annotations

import copy

import torch
import transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 1}
MODERN = {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 8, "bos_token_id": 2, "eos_token_id": 3,
          "cls_token_id": 2, "sep_token_id": 3}  # fmt: skip
CONFIGS = {
    "ViT": {**IMAGE, "num_labels": 5},
    "DeiT": {**IMAGE, "num_labels": 5},
    "Dinov2": {**IMAGE, "num_labels": 5},
    "Dinov2WithRegisters": {**IMAGE, "num_labels": 5, "use_swiglu_ffn": True},
    "DINOv3ViT": {**IMAGE, "num_register_tokens": 3},
    "SiglipVision": IMAGE,
    "CLIPVision": IMAGE,
    "Bert": TEXT,
    "Roberta": TEXT,
    "XLMRoberta": TEXT,
    "Camembert": TEXT,
    "ModernBert": MODERN,
}
TEXTS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "ModernBert")
LENGTHS = (19, 7, 12)
WORDS = torch.randint(4, 60, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(2))


def config_of(family, **more):
    return getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **more})


def build(family, head="Model", **more):
    """A model with random weights in evaluation mode: ``build("Bert", "ForSequenceClassification")``."""
    model = getattr(transformers, family + head)(config_of(family, **more))
    torch.manual_seed(0)  # here: what a class draws for itself depends on the version of torch
    for parameter in model.parameters():  # away from zeros and ones, so that every term counts
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs_of(model):
    """Three images, or three texts of one length."""
    if model.main_input_name == "input_ids":
        return {"input_ids": WORDS}
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def padded(side="right"):
    """The three texts, the shorter ones padded."""
    ids, mask = torch.ones_like(WORDS), torch.zeros_like(WORDS)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(WORDS.shape[1] - length, None)
        ids[row, at], mask[row, at] = WORDS[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


def layers_of(model):
    return next(
        m for n, m in model.named_modules() if n.endswith(("layer", "layers")) and isinstance(m, torch.nn.ModuleList)
    )


def keep(scores, k):
    """Positions of the k highest scores, ascending; equal ones keep the earlier token."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:k])


@torch.no_grad()
def reference(model, inputs, router, blocks, capacity, weights=None, prefix=0):
    """Last hidden state (N, D) of one text or image alone, and by routed layer its kept positions and scores."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    layers, state, decisions = layers_of(model), {}, {}

    def see_map(module, args, out):
        state["map"] = out[1]  # (1, H, N, N)

    def before(i):
        def choose(layer, args, kwargs):
            if i not in blocks:
                return None
            x = args[0]
            if router == "linear":
                scores = torch.stack([weights[i] @ token for token in x[0]])
            elif router == "reversed":
                scores = -state["left"]
            else:
                scores = state["left"]
            ranked = scores.clone()
            ranked[:prefix] = torch.inf
            kept = keep(ranked, max(1, prefix + 1 if prefix else 1, int(round(capacity * len(scores), 9))))
            decisions[i] = kept, scores
            hidden = torch.full((len(scores),), -torch.inf)
            hidden[kept] = 0
            if len(args) > 1:
                mask = hidden if args[1] is None else args[1] + hidden
                return (x, mask.expand(1, 1, len(scores), -1), *args[2:]), kwargs
            given = kwargs.get("attention_mask")
            mask = hidden if given is None else given + hidden
            return args, {**kwargs, "attention_mask": mask.expand(1, 1, len(scores), -1)}

        return choose

    def after(i):
        def mix(layer, args, kwargs, out):
            maps = state["map"][0]
            row = 0 if router == "class_attention" else slice(None)
            if i not in blocks:
                state["left"] = maps[:, row].reshape(maps.shape[0], -1, maps.shape[-1]).mean(dim=(0, 1))
                return None
            kept, scores = decisions[i]
            if "left" in state and not (router == "class_attention" and 0 not in kept):
                left = state["left"].clone()
                among = maps[:, kept][:, :, kept]
                among = among[:, row].reshape(maps.shape[0], -1, len(kept)).mean(dim=(0, 1))
                left[kept] = left[kept].sum() * among
                state["left"] = left
            r = scores[kept][:, None] if router in ("linear", "attention_weighted") else 1.0
            mixed = args[0].clone()
            mixed[0, kept] += r * (out[0, kept] - mixed[0, kept])
            return mixed

        return mix

    for i, layer in enumerate(layers):
        attention = next(m for m in layer.modules() if hasattr(m, "is_causal"))
        attention.register_forward_hook(see_map)
        layer.register_forward_pre_hook(before(i), with_kwargs=True)
        layer.register_forward_hook(after(i), with_kwargs=True)
    return model(**inputs).last_hidden_state[0], decisions
