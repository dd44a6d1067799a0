"""Builds the embedded demo model: an invented world, its corpus, a tokenizer, training on the CPU and evaluation."""
