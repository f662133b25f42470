"""What GN costs, and what of it the fused layers take away (``tools/benchmark.py``)."""
