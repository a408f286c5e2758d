"""Text to batches: sources, tokenizers, token shards, mixtures, packing, the loader."""
