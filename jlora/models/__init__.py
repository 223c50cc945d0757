"""The network: LLaMA-family models in Flax NNX, attention, quantization, and the loader of weights."""
