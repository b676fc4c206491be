"""Every family of timm's that ``amod.convert`` serves, small: name -> (model, input size)."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from timm.layers import RmsNorm, SwiGLU
from timm.models import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 7}
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 64}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "deit3_layerscale": ("deit3_small_patch16_224", {"img_size": 64}),
    "augreg": ("vit_tiny_patch16_224", {"img_size": 64}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "num_classes": 7}),
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", {"img_size": 56, "mlp_ratio": 2.0}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True}),
    "gap_no_class_token": ("vit_base_patch16_gap_224", {"img_size": 64}),
    "so150m_registers_gap": ("vit_so150m_patch16_reg4_gap_256", {"img_size": 64}),
    "patch32": ("vit_small_patch32_224", {"img_size": 224}),
    "pixels384": ("vit_tiny_patch16_384", {"depth": 3}),
    "dynamic_image_size": ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 96}),
    "siglip_map_pool": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 128}),
    "post_norm": (None, {"img_size": 64, "block_fn": ResPostBlock}),
    "rms_swiglu": (None, {"img_size": 64, "norm_layer": RmsNorm, "mlp_layer": SwiGLU, "qk_norm": True}),
    "beit": ("beit_base_patch16_224", {"img_size": 64}),
    "beitv2": ("beitv2_base_patch16_224", {"img_size": 64, "use_shared_rel_pos_bias": True}),
    "beit3_scale_norm": ("beit3_base_patch16_224", {"img_size": 64}),
    "relpos": ("vit_relpos_small_patch16_224", {"img_size": 64}),
    "relpos_class_token": ("vit_relpos_base_patch16_clsgap_224", {"img_size": 64}),
    "relpos_shared": ("vit_srelpos_small_patch16_224", {"img_size": 64}),
    "relpos_post_norm": ("vit_relpos_small_patch16_rpn_224", {"img_size": 64}),
    "eva": ("eva_giant_patch14_224", {"img_size": 56}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "eva02_separate": ("eva02_base_patch14_224", {"img_size": 56, "qkv_fused": False}),
    "eva_post_norm": ("eva02_tiny_patch14_224", {"img_size": 56, "use_post_norm": True}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3", {"img_size": 64}),
    "perception_encoder": ("vit_pe_core_small_patch16_384", {"img_size": 64}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}),
    "rope_axial_absolute": ("vit_small_patch16_rope_ape_224", {"img_size": 64}),
    "rope_registers": ("vit_mediumd_patch16_rope_reg1_gap_256", {"img_size": 64}),
    "grouped_queries": (
        "vit_small_patch16_dinov3",
        {"img_size": 64, "attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    ),
    "no_qkv_bias": (None, {"img_size": 64, "qkv_bias": False, "reg_tokens": 2, "no_embed_class": True}),
}
if "num_kv_heads" not in inspect.signature(Eva).parameters:  # an older timm
    del FAMILIES["grouped_queries"]
PLACED = ("beit", "beitv2", "relpos", "relpos_class_token", "relpos_shared", "relpos_post_norm", "eva", "eva02",
          "eva02_separate", "eva_post_norm", "dinov3", "dinov3_swiglu", "perception_encoder", "rope_mixed",
          "rope_axial_absolute", "rope_registers", "grouped_queries")  # fmt: skip
"""Those whose blocks read where a token stands: rotary rows, relative positions."""
PLAIN = [family for family in FAMILIES if family not in PLACED]
INPUT = {
    "hybrid": 128,
    "eva": 56,
    "eva02": 56,
    "eva02_separate": 56,
    "eva_post_norm": 56,
    "dinov2_registers": 56,
    "dinov2_swiglu": 56,
    "patch32": 224,
    "pixels384": 384,
    "clip": 96,
}


def build(family: str) -> tuple[Any, tuple[int, int, int]]:
    name, kwargs = FAMILIES[family]
    kwargs = {**SMALL, **kwargs}
    vit = VisionTransformer(**kwargs) if name is None else timm.create_model(name, **kwargs)
    for parameter in vit.parameters():  # away from zeros and ones, so that every term counts
        torch.nn.init.normal_(parameter, std=0.15)
    size = INPUT.get(family, 80 if family == "dynamic_image_size" else 64)
    return vit.eval(), (3, size, size)
