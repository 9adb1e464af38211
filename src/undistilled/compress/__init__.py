"""From a model's weights to smaller ones that lose little: measure what matters, share out bits, choose values."""
