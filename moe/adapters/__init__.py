"""What fine-tuning trains beside frozen weights."""
