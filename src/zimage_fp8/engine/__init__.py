"""What makes a loaded model fast on a GPU: fused kernels, CUDA graphs, no work done twice."""
