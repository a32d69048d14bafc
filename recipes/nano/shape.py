"""The sizes of nano, and of a tiny stand-in that runs the same code in seconds on a CPU."""

from dataclasses import dataclass, replace

from zimage_fp8.model.z_image import ZImageConfig

SIZE = 256  # pixels
LATENT_SIZE = SIZE // 8
LATENT_CHANNELS = 16
SHORT, LONG = 32, 64  # the two caption buckets, in tokens, chat template included
STEPS = 8
SHIFT = 3.0


@dataclass(frozen=True)
class Shape:
    """Everything that differs between the real model and the smoke test."""

    num_objects: int | None = None  # None: all of them

    vae_channels: tuple[int, ...] = (32, 64, 96, 96)
    vae_batch: int = 56  # from 64 on diffusers upsamples in the slower memory layout
    vae_lr: float = 1e-3
    kl: float = 5e-4

    # Deep and narrow: quantization error should have layers to travel through.
    dim: int = 192
    head_dim: int = 64
    n_layers: int = 22
    n_refiner_layers: int = 2
    text_dim: int = 192
    text_ffn: int = 384
    text_layers: int = 3  # hidden_states[-2] is read: the last layer is never trained

    batch: int = 256
    lr: float = 1.2e-3
    warmup_steps: int = 500
    ema: float = 0.999
    cache_rows: int = 131_072
    first_rows: int = 32_768
    chunk: int = 256  # rows composed and encoded at once, always this many: one compiled encoder
    log_every: int = 200
    num_evaluated: int = 512
    num_pairs_evaluated: int = 256
    num_reconstructed: int = 256

    @property
    def transformer(self) -> ZImageConfig:
        return ZImageConfig(
            dim=self.dim,
            n_layers=self.n_layers,
            n_refiner_layers=self.n_refiner_layers,
            n_heads=self.dim // self.head_dim,
            cap_feat_dim=self.text_dim,
            in_channels=LATENT_CHANNELS,
            axes_dims=(16, 24, 24),
            axes_lens=(1024, 512, 512),
        )


NANO = Shape()
TINY = replace(
    NANO,
    num_objects=24,
    vae_channels=(8, 8, 16, 16),
    vae_batch=4,
    dim=64,
    n_layers=2,
    n_refiner_layers=1,
    text_dim=64,
    text_ffn=64,
    batch=8,
    warmup_steps=5,
    cache_rows=64,
    first_rows=32,
    chunk=16,
    log_every=5,
    num_evaluated=16,
    num_pairs_evaluated=8,
    num_reconstructed=8,
)
