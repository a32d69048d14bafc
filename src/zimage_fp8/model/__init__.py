"""Z-Image: the transformer, its text encoder and VAE, the sampler, and the pipeline over them."""
