"""Z-Image-Turbo in 8 bits: quantize it, prove what it costs, serve it fast."""

__version__ = "0.1.0"
