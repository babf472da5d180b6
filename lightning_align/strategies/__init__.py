"""Where tensors live: strategies for ``Trainer(strategy=...)``."""
