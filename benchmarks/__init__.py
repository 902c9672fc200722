"""Speed and memory, plain against fast.

Run `python -m benchmarks.step`, `.memory`, `.retrain`, `.data`, `.packing`, `.sweep`, `.report` or
`.orchestration`.
"""
