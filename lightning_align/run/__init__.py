"""Position, randomness and state of a run; everything above may use this room."""
