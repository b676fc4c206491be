"""Which words each layer of a routed text model keeps, as one line of text per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

import amod
from amod.errors import UserError, one_line
from amod.files import expanded
from amod.flops import reads_text
from amod.training.config import ExplainConfig
from amod.training.terminal import quiet
from amod.training.weights import variant

KEPT, SKIPPED = "bold green", "dim"


def explain_text(cfg: ExplainConfig) -> None:
    """What ``src/explain.py`` does with text=: print the lines of the model in the folder run=."""
    quiet()
    folder = expanded(str(cfg.run))
    tokenizer = tokenizer_of(folder)
    model = amod.from_pretrained(folder)
    if not reads_text(model):
        raise UserError(f"run={cfg.run}: its {type(model).__name__} reads no text; leave text= out")
    if not hasattr(model, "plan"):
        model = variant(model, cfg)
    torch.manual_seed(cfg.seed)
    console = Console()
    for line in kept_words(model, tokenizer, str(cfg.text), coloured=console.is_terminal):
        console.print(line, soft_wrap=True)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of the files
        raise UserError(f"run={folder}: has no tokenizer ({one_line(error)}); save it into the same folder") from error


@torch.inference_mode()
def kept_words(model: Any, tokenizer: Any, text: str, coloured: bool = True) -> list[Text]:
    """One line per routed layer: ``layer 3: 7 of 14`` and the text, with special tokens where they stand.

    Args:
        model, tokenizer: a routed text model of transformers' and its fast tokenizer.
        coloured: what is skipped is pale; else its letters are underscores.
    """
    found = tokenizer(text, return_offsets_mapping=True, truncation=True)
    ids, spans = found["input_ids"], found["offset_mapping"]
    _, routing = model(input_ids=torch.tensor([ids]), return_routing=True)
    names = tokenizer.convert_ids_to_tokens(ids)
    lines = []
    for layer in routing:
        kept = layer.tokens(len(ids))[0].tolist()
        line, at, apart = Text(f"layer {layer.layer}: {sum(kept)} of {len(ids)} "), 0, True
        for name, (start, end), stays in zip(names, spans, kept, strict=True):
            special = end == start
            word = name if special else text[start:end]
            line.append(" " if special or apart else text[at:start])
            line.append(word if coloured or stays else "_" * len(word), style=KEPT if stays else SKIPPED)
            at, apart = max(at, end), special
        lines.append(line)
    return lines
