"""From what a user passes as ``model`` to a module, and back to a folder."""
