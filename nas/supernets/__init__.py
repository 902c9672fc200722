"""Supernets: how candidate architectures share weights. A supernet is a module (x, gates) -> logits."""
