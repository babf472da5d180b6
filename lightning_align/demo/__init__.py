"""The demo's yardsticks and report: what a small model's numbers are measured against."""
