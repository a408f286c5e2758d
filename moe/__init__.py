"""Sparse mixture-of-experts language models: pre-train, fine-tune and study their routers."""

__version__ = "0.1.0"
