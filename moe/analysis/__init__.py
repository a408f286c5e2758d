"""What routers learnt, from a checkpoint and a text: `moe analyze`."""
