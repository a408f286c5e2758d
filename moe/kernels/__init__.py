"""Hand-written forward and backward passes and device-specific paths, each beside its plain reference."""
