import warnings

# A rank reads what it needs without the others, and a model is written by one process: what torch then says it assumes
# is what is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
