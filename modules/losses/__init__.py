"""Pure loss functions: tensors in, ``(loss, metrics)`` or a tensor out. They need torch alone."""
