"""Tandem: one LLM engine that serves a model and fine-tunes LoRA adapters on it in the same iterations."""

__version__ = "0.1.0"
