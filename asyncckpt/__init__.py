"""Asynchronous, verified, resumable checkpoints for PyTorch training, to any fsspec URL."""
