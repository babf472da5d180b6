import torch

# Forking after a multi-threaded backward hangs; after a single-threaded one it does not.
torch.set_num_threads(1)
