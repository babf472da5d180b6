"""Pictures and texts, through whatever loggers the run has."""
