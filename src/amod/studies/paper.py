"""The figures that A-MoD (arXiv 2412.20875) prints, in one place. Accuracies in percent, compute in GFLOPs (MACs).

Keys are (model, router, capacity); a model is a name of conf/model, a router one of conf/router.
"""

from __future__ import annotations

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
# As text, because the digits printed are the digits to agree in (Tables 1, 4, 5 and A.1).
_GFLOPS = {
    "deit_tiny": ("1.258", "0.746", "0.7094", "0.7092", "0.951", "0.9274", "0.9272"),
    "deit_small": ("4.608", "2.333", "2.5919", "2.5915", "3.471", "3.4209", "3.4204"),
    "vit_base": ("17.583", "8.850", "9.8765", "9.8756", "13.216", "13.1057", "13.1048"),
    "vit_large": ("61.604", "33.440", "34.5236", "34.5211", "46.242", "45.9282", "45.9257"),
}
GFLOPS = {
    (model, *column): printed for model, row in _GFLOPS.items() for column, printed in zip(COLUMNS, row, strict=True)
}


def _cells(table: dict[str, tuple[float, ...]], columns: tuple[tuple[str, float], ...]):
    return {(model, *column): value for model, row in table.items() for column, value in zip(columns, row, strict=True)}


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
}
"""study -> data -> (model, router, capacity) -> top-1 in percent."""


def accuracy(study: str, data: str, model: str, router: str, capacity: float) -> float | None:
    """The accuracy that the paper prints for this cell, or None where it prints none."""
    return ACCURACY.get(study, {}).get(data, {}).get((model, router, capacity))
