"""One op per file: the PyTorch reference says what is computed, and runs everywhere."""

from zimage_fp8.kernels.attention import attention
from zimage_fp8.kernels.rms_norm import rms_norm, rms_norm_scaled
from zimage_fp8.kernels.rope import apply_rope, rope_table
from zimage_fp8.kernels.scaled_mm import scaled_mm
from zimage_fp8.kernels.swiglu import swiglu

__all__ = [
    "apply_rope",
    "attention",
    "rms_norm",
    "rms_norm_scaled",
    "rope_table",
    "scaled_mm",
    "swiglu",
]
