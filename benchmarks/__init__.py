"""Speed and memory, plain against fast.

Run `python -m benchmarks.step`, `.memory`, `.retrain`, `.data` or `.packing`.
"""
