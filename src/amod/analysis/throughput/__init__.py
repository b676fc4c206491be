"""How fast, how large, and where the time goes: what `src/benchmark.py` measures.

Variants are timed in turns in one process (A B C A B C ...), so that whatever else the machine does meets all of
them alike, and a speed-up is the median of the ratios *within* a round, never a ratio of two medians. A variant is a
name: ``dense`` (the timm model with its fused attention, the baseline of everything), ``tome_r13`` (ToMe with r = 13),
or one of ``isoflop linear attention attention_weighted random tome`` with a capacity, as in ``attention@0.125``.
``tome@C`` merges the r tokens per block whose FLOPs come closest to those of A-MoD at C.
"""
