import warnings

# A rank reads its own tensors without the others, and one process writes a model. torch warns that it assumes a single
# process; that is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
