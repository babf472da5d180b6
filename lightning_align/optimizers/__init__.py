"""Optimizers: one object holds matrix groups and AdamW groups, and its state is plain tensors."""
