"""What makes a loaded model fast on a GPU: fused kernels, CUDA graphs, no work done twice."""

from zimage_fp8.engine.loading import EngineOptions, fast_parts, load_pipeline

__all__ = ["EngineOptions", "fast_parts", "load_pipeline"]
