"""Text to batches: sources, tokenizers, memory-mapped token shards, mixtures, packing, the loader."""
