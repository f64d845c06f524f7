"""PyTorch's own operations, where the reference's passes are not the fastest of them."""
