"""fastllm: custom fused kernels for LLaMA-family models in PyTorch."""
