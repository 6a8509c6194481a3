"""State as exact bits, for tests that must tell 0.0 from -0.0 and find NaN equal to itself."""

import torch


def bits(tree):
    """Nested values with each tensor as its dtype, shape, strides and bytes."""
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach().cpu().contiguous().reshape(-1)
        return (tree.dtype, tuple(tree.shape), tuple(tree.stride()), tensor.view(torch.uint8).numpy().tobytes())
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(v) for v in tree]
    return tree
