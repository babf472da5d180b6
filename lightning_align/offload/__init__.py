"""Parameters, gradients and optimizer state that live on disk, and the few that are in memory.

A *block* is what comes and goes together. Its values lie in files of its own (``store``), are read
into reused memory (``buffers``) before they are needed (``prefetch``), and the optimizer steps a
few tensors of it at a time (``optimizer_stream``). ``engine`` puts that to work in a module's
forward and backward. Nothing here knows of Lightning.
"""
