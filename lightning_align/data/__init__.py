"""Text and preference pairs on disk, in memory and in batches (knows torch, never Lightning)."""
