"""Which layers become 8 bits and how: policies, the quantized linear layer, calibration."""
