"""From logits to text: sampling filters, the loop, the engines and their kernels."""
