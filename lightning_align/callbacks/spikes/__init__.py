"""``SpikeGuard``: where its verdict falls (``guard``), and a file for each question that it asks.

Whether a step is a spike is asked of ``stability``, and why it is one of ``spike_causes``.
"""
