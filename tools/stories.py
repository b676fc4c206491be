"""llama2.c's little story writer as a folder that transformers reads, and stories that it wrote as text to learn from.

    python tools/stories.py --model stories260K.bin --words tok512.bin --out models/stories260K
    python tools/stories.py --out models/stories260K --write 1200 --texts texts/stories

The first converts (github.com/ytmytm/llama2.c64 has both files) and prints the greedy text behind "Once upon a time".
The second samples so many stories at temperature 1, one seed, into one .txt file: text of the model's own distribution,
so its loss there is the entropy of its own writing, not what it would be on a corpus of people's.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def read_model(file: Path) -> LlamaForCausalLM:
    """llama2.c's legacy format: seven int32, then float32."""
    data = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, words, length = struct.unpack("7i", data[:28])
    if words < 0:
        raise SystemExit(
            f"error: {file}: has a head of its own (vocabulary {words}), which is not read; use a tied one"
        )
    rest = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy())
    at, width = 0, dim // heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += (count := int(np.prod(shape)))
        return rest[at - count : at].view(shape)

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Rotary pairs (0, 1), (2, 3), ... become (0, d/2), (1, d/2 + 1), ..."""
        return weight.view(layers, count, width // 2, 2, dim).transpose(2, 3).reshape(layers, count * width, dim)

    state = {"model.embed_tokens.weight": take(words, dim)}
    names = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * width, dim)),
    ]
    names += [("self_attn.v_proj", (kv_heads * width, dim)), ("self_attn.o_proj", (dim, dim))]
    names += [("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden))]
    for name, shape in [*names, ("mlp.up_proj", (hidden, dim))]:
        stacked = take(layers, *shape)
        if name.endswith(("q_proj", "k_proj")):
            stacked = halves(stacked, heads if "q_proj" in name else kv_heads)
        state |= {f"model.layers.{i}.{name}.weight": weight for i, weight in enumerate(stacked)}
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=words, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def read_words(file: Path) -> PreTrainedTokenizerFast:
    """Scores and pieces of a sentencepiece BPE: the pair of the highest score is joined first."""
    data, at, scores, words = file.read_bytes(), 4, [], []
    while at < len(data):
        score, size = struct.unpack_from("fi", data, at)
        words.append(data[at + 8 : at + 8 + size].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    words[:3] = "<unk>", "<s>", "</s>"
    ids = {word: i for i, word in enumerate(words)}
    joined = [i for i, word in enumerate(words) if i > 258 and len(word) > 1]
    merges = [
        (words[i][:cut], words[i][cut:])
        for i in sorted(joined, key=lambda i: -scores[i])
        for cut in range(1, len(words[i]))
        if words[i][:cut] in ids and words[i][cut:] in ids
    ]
    made = Tokenizer(BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
    )


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, folder: Path) -> None:
    torch.manual_seed(0)
    stories: list[str] = []
    while len(stories) < count:
        start = torch.full((min(200, count - len(stories)), 1), 1)
        found = model.generate(
            start, do_sample=True, top_k=0, max_new_tokens=320, attention_mask=torch.ones_like(start)
        )
        stories += tokenizer.batch_decode(found, skip_special_tokens=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(story.strip() for story in stories), encoding="utf-8")
    print(f"{count} stories in {folder / 'stories.txt'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="stories260K.bin")
    parser.add_argument("--words", type=Path, help="tok512.bin")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the converted model")
    parser.add_argument("--write", type=int, help="how many stories to sample")
    parser.add_argument("--texts", type=Path, default=Path("texts/stories"), help="their folder")
    given = parser.parse_args()
    if (given.model is None) != (given.words is None):
        parser.error("--model and --words go together")
    if given.model is not None:
        model, tokenizer = read_model(given.model), read_words(given.words)
        model.save_pretrained(given.out)
        tokenizer.save_pretrained(given.out)
    else:
        model = LlamaForCausalLM.from_pretrained(given.out).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(given.out)
    if given.write:
        write(model, tokenizer, given.write, given.texts)
    else:
        start = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
        print(tokenizer.decode(model.generate(start, do_sample=False, max_new_tokens=120)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
