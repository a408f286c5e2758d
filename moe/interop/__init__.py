"""Models in and out: Hugging Face folders, upcycling of dense models (docs/interop.md)."""
