"""The figures that A-MoD (arXiv 2412.20875) prints, in one place. Accuracies in percent, compute in GFLOPs (MACs).

Keys are (model, router, capacity); a model is a name of conf/model, a router one of conf/router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ARCHITECTURES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}
COLUMNS = (
    ("none", 1.0),
    ("isoflop", 0.125),
    ("linear", 0.125),
    ("attention", 0.125),
    ("isoflop", 0.5),
    ("linear", 0.5),
    ("attention", 0.5),
)


Cell = tuple[str, str, float]


def _cells(table: Mapping[str, Sequence[Any]], columns: Sequence[tuple[str, float]]) -> dict[Cell, Any]:
    return {(model, *column): value for model, row in table.items() for column, value in zip(columns, row, strict=True)}


# The compute as it is printed, as text, because the digits printed are the digits to agree in. Some are rounded, some
# cut off (0.9274 is 0.92 in Table 1); Tables 4 and 5 are about heads of 196, 102 and 37 classes. 3 and 8 have none.
_GFLOPS_4_5 = _cells(
    {
        "deit_tiny": ("0.746", "0.709", "0.709", "0.951", "0.927", "0.927"),
        "deit_small": ("2.333", "2.592", "2.591", "3.47", "3.42", "3.42"),
        "vit_base": ("8.849", "9.876", "9.875", "13.216", "13.105", "13.104"),
        "vit_large": ("33.439", "34.523", "34.52", "46.241", "45.927", "45.925"),
    },
    COLUMNS[1:],
)
# Table 9: DETR on COCO, mAP; the compute is of encoder and decoder, at 800 x 1066 pixels.
_TABLE_9 = (("none", 1.0), ("linear", 0.5), ("attention", 0.5))
GFLOPS = {
    "table9": _cells({"detr": ("10.745", "7.747", "7.745")}, _TABLE_9),
    "table1": _cells(
        {
            "deit_tiny": ("0.75", "0.71", "0.71", "0.95", "0.92", "0.92"),
            "deit_small": ("2.3", "2.6", "2.6", "3.47", "3.42", "3.42"),
            "vit_base": ("8.8", "9.8", "9.8", "13.21", "13.1", "13.1"),
            "vit_large": ("33.4", "34.5", "34.5", "46.24", "45.92", "45.92"),
        },
        COLUMNS[1:],
    ),
    "table4": _GFLOPS_4_5,
    "table5": _GFLOPS_4_5,
    "table7": {("deit_small", "none", 1.0): "4.6", ("deit_small", "attention", 0.5): "3.8"},
}
"""study -> (model, router, capacity) -> GFLOPs as printed."""

# Table 1: ImageNet, fine-tuned.
_TABLE_1 = _cells(
    {
        "deit_tiny": (67.4, 67.52, 69.76, 71.1, 69.78, 71.8),
        "deit_small": (73.53, 76.07, 76.98, 78.04, 77.43, 78.66),
        "vit_base": (77.69, 78.49, 78.42, 79.28, 79.5, 80.4),
        "vit_large": (77.64, 81.1, 81.37, 80.28, 82.04, 82.82),
    },
    COLUMNS[1:],
)
# Table 3: ImageNet, adapted without training.
_TABLE_3 = _cells(
    {
        "deit_tiny": (4.45, 52.6, 0.42, 0.97),
        "deit_small": (0.23, 13.49, 0.16, 0.35),
        "vit_base": (69.91, 78.88, 62.25, 66.62),
        "vit_large": (0.43, 49.06, 0.2, 6.03),
    },
    (("linear", 0.5), ("attention", 0.5), ("linear", 0.125), ("attention", 0.125)),
)
# Tables 4 (12.5 %) and 5 (50 %): transfer.
_TABLES_4_5 = {
    "cars": _cells(
        {
            "deit_tiny": (85.09, 75.77, 78.32, 88.22, 83.98, 86.9),
            "deit_small": (89.88, 85.36, 86.39, 91.97, 89.58, 90.10),
            "vit_base": (91.57, 89.8, 89.26, 92.61, 91.18, 91.15),
            "vit_large": (92.97, 90.87, 91.39, 93.17, 92.0, 91.95),
        },
        COLUMNS[1:],
    ),
    "flowers": _cells(
        {
            "deit_tiny": (90.73, 81.39, 82.82, 93.42, 87.82, 89.75),
            "deit_small": (90.97, 88.46, 89.44, 94.6, 91.0, 91.8),
            "vit_base": (92.29, 92.87, 91.77, 96.0, 93.62, 93.08),
            "vit_large": (97.7, 95.85, 96.66, 96.13, 95.69, 96.56),
        },
        COLUMNS[1:],
    ),
    "pets": _cells(
        {
            "deit_tiny": (85.3, 84.05, 84.68, 87.84, 86.94, 87.92),
            "deit_small": (86.42, 86.04, 89.58, 87.84, 91.36, 92.12),
            "vit_base": (88.98, 92.85, 92.61, 92.64, 92.72, 93.21),
            "vit_large": (92.3, 89.1, 88.4, 92.8, 89.67, 90.37),
        },
        COLUMNS[1:],
    ),
}
# Table 7: DeiT-Small dense, and A-MoD at 3.8 GFLOPs (its capacity is lost; see conf/study/table7.yaml).
_TABLE_7 = {("deit_small", "none", 1.0): 79.6, ("deit_small", "attention", 0.5): 79.63}
# Table 8: from scratch; the capacity is lost too.
_TABLE_8 = _cells({"deit_small": (75.90, 76.63), "vit_base": (72.47, 73.66)}, (("linear", 0.5), ("attention", 0.5)))

ACCURACY = {
    "table1": {"imagenet": _TABLE_1},
    "table3": {"imagenet": _TABLE_3},
    "table4": _TABLES_4_5,
    "table5": _TABLES_4_5,
    "table7": {"imagenet": _TABLE_7},
    "table8": {"imagenet": _TABLE_8},
    "table9": {"coco": _cells({"detr": (39.9, 39.6, 38.6)}, _TABLE_9)},
}
"""study -> data -> (model, router, capacity) -> top-1, of table9 mAP, in percent."""
PUBLISHED = {
    "table6": (
        ("dense", "DeiT-T / S", "72.2 / 79.8", "1.258 / 4.608", "DeiT, timm"),
        ("A-MoD, trained, 50 %", "DeiT-T / S", "71.8 / 78.66", "0.93 / 3.42", "A-MoD, Table 1"),
        ("A-MoD, untrained, 50 %", "DeiT-S", "13.49", "3.42", "A-MoD, Table 3"),
        ("ToMe, trained (distilled), r = 13", "DeiT-T / S", "71.27 / 79.36", "0.737 / 2.712", "ToMe's README"),
        ("ToMe, untrained, r = 13", "DeiT-S", "78.79", "2.712", "ToMeCIS"),
        ("EViT, trained, keep 0.9 / 0.7 / 0.5", "DeiT-S", "79.8 / 79.5 / 78.5", "4.0 / 3.0 / 2.3", "EViT's README"),
        ("DynamicViT, trained, keep 0.7", "DeiT-S", "79.32", "2.9", "its README"),
        ("DynamicViT, as A-MoD's Table 6 has it", "DeiT-S", "78.3", "3.4", "quoted from A-ViT's Table 3"),
        ("ToMe (distilled), as A-MoD's Table 6 has it", "DeiT-T / S", "71.69 / 79.68", "0.93 / 3.43", "A-MoD, Table 6"),
        ("A-ViT, trained", "DeiT-T / S", "71.4 / 78.8", "0.8 / 3.6", "its README (paper: 71.0, 78.6)"),
    ),
}
"""study -> rows of (method, model, top-1, GFLOPs, source), as they are printed."""
PLACEMENT = {"table7": "last8"}  # the placement of a table's figures; of the others "alternate"
