"""FlashAttention-4 (CuTe DSL), an optional extra: intervals as a mask function and lists of visible blocks."""
