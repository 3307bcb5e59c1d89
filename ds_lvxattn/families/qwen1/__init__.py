"""Qwen-VL (arXiv 2308.12966), the first of its name: model, tokenizer and family."""
