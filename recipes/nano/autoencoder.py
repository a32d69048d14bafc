"""The autoencoder: diffusers' AutoencoderKL, 16 channels at an eighth of the size."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models import upsampling
from torch import Tensor

from recipes.nano import captions, weights
from recipes.nano.compiling import try_compiled
from recipes.nano.masters import Masters
from recipes.nano.scenes import Cutouts
from recipes.nano.schedule import Schedule, lr_factor
from recipes.nano.shape import LATENT_CHANNELS, SIZE, Shape
from recipes.nano.sheets import save_sheet
from recipes.nano.team import Team
from recipes.nano.workspace import Workspace

STEM = "vae"
SAVE_EVERY_S = 60

# It asks for a torch before 2.1 in BF16 upsampling, and asking breaks the compiled graph.
upsampling.is_torch_version = lambda *_: False

OBJECT_WEIGHT = 2.0  # an object's pixels count 1 + 2 times a background's
COARSE_WEIGHT, EDGE_WEIGHT = 0.5, 0.5


def build_autoencoder(shape: Shape, scaling: float = 1.0, shift: float = 0.0) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=shape.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


class Codec:
    """A finished autoencoder: pictures to normalized latents and back."""

    def __init__(
        self, folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype
    ) -> None:
        state, self.facts = weights.load_pieces(folder, STEM)
        self.scaling, self.shift = self.facts["scaling_factor"], self.facts["shift_factor"]
        self.vae = build_autoencoder(shape, self.scaling, self.shift)
        self.vae.load_state_dict(state)
        weights.set_dtype(self.vae, dtype).to(device, memory_format=torch.channels_last)
        self.vae.eval().requires_grad_(False)
        self.dtype = dtype
        self.encoder = self.vae.encoder

    def compile_encoder(self, work: Workspace, images: Tensor) -> None:
        """Compile for batches shaped like `images`, and no others."""
        self.encoder = torch.compile(self.vae.encoder, dynamic=False)

        def give_up() -> None:
            self.encoder = self.vae.encoder

        try_compiled(work, "latent encoder", lambda: self.encode(images), give_up)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[batch, 3, 256, 256] in -1..1 to fp32 latents near unit variance."""
        images = images.to(self.dtype, memory_format=torch.channels_last)
        mean = self.encoder(images).float().chunk(2, dim=1)[0]
        return (mean - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 32) -> Tensor:
        latents = latents / self.scaling + self.shift
        images = [self.vae.decoder(part.to(self.dtype)).float() for part in latents.split(batch)]
        return torch.cat(images).clamp(-1, 1)

    def reconstruct(self, images: Tensor, batch: int = 32) -> Tensor:
        return self.decode(torch.cat([self.encode(part) for part in images.split(batch)]), batch)


def psnr_db(a: Tensor, b: Tensor) -> Tensor:
    """Of pictures in -1..1, one by one: fp32 [batch]."""
    mse = ((a.float() - b.float()) / 2).pow(2).mean((1, 2, 3))
    return -10 * torch.log10(mse + 1e-12)


def reconstruction_loss(out: Tensor, image: Tensor, cover: Tensor) -> Tensor:
    """L1 at full and a quarter of the size, and L1 of the differences between neighbours."""
    out = out.float()
    weight = 1 + OBJECT_WEIGHT * cover
    error = out - image
    fine = (error.abs() * weight).mean() / weight.mean()
    coarse = F.avg_pool2d(error, 4).abs().mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges = edges + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return fine + COARSE_WEIGHT * coarse + EDGE_WEIGHT * edges


class Step:
    """One training step's loss, as one graph from picture to scalar."""

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, kl: float) -> None:
        self.vae, self.dtype, self.kl = vae, dtype, kl

    def __call__(self, image: Tensor, cover: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss and its parts [loss, L1, KL] for the log."""
        moments = self.vae.encoder(image.to(self.dtype)).float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        latent = mean + (0.5 * logvar).exp() * noise
        out = self.vae.decoder(latent.to(self.dtype))
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(out, image, cover) + self.kl * kl
        return loss, torch.stack([loss, (out.float() - image).abs().mean(), kl]).detach()


def train_autoencoder(
    work: Workspace, shape: Shape, team: Team, seconds: float, *, dtype: torch.dtype, compiled: bool
) -> None:
    """Train for `seconds`, go on from a saved state if there is one, and write weights."""
    torch.manual_seed(team.rank)
    torch.backends.cudnn.benchmark = True
    things = captions.load_things(work.data, shape.num_objects)
    cutouts = Cutouts(work.data, things, team.device)
    torch.manual_seed(0)
    vae = build_autoencoder(shape).to(team.device)
    masters = Masters(
        vae.named_parameters(), dtype, lr=shape.vae_lr, betas=(0.9, 0.98), weight_decay=1e-4,
        ema=shape.ema,
    )  # fmt: skip
    file = work.state / "vae.pt"
    saved = torch.load(file, map_location=team.device) if file.exists() else None
    spent, done = (saved["spent_s"], saved["done"]) if saved else (0.0, 0.0)
    if saved:
        masters.load_state_dict(saved["masters"])
    schedule = Schedule(work.started, seconds, spent + seconds, spent, done)
    torch.manual_seed(1 + team.rank + 1000 * masters.steps)
    work.log(
        f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters on "
        f"{team.size} x {team.device}, from step {masters.steps}"
    )

    step = Step(vae, dtype, shape.kl)
    run = _compile_step(work, step, cutouts, shape, masters) if compiled else step
    schedule.begin()
    _loop(work, shape, team, schedule, masters, cutouts, run, file)
    masters.use_average()
    _finish(work, shape, team, vae, cutouts, masters.steps, dtype)


def _batch(cutouts: Cutouts, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    image, cover = cutouts.varied(shape.vae_batch)
    small = (shape.vae_batch, LATENT_CHANNELS, SIZE // 8, SIZE // 8)
    noise = torch.randn(small, device=image.device)
    return image.contiguous(memory_format=torch.channels_last), cover, noise


def _compile_step(
    work: Workspace, step: Step, cutouts: Cutouts, shape: Shape, masters: Masters
) -> Step:
    running = {"step": torch.compile(step.__call__, dynamic=False)}

    def attempt() -> None:
        running["step"](*_batch(cutouts, shape))[0].backward()
        if cutouts.device.type == "cuda":
            torch.cuda.synchronize()
        masters.drop_gradients()

    try_compiled(work, "vae step", attempt, lambda: running.update(step=step))
    return running["step"]


def _loop(
    work: Workspace,
    shape: Shape,
    team: Team,
    schedule: Schedule,
    masters: Masters,
    cutouts: Cutouts,
    run: Step,
    file: Path,
) -> None:
    parts, counted, since = torch.zeros(3, device=team.device), 0, time.monotonic()
    saved_at = time.monotonic()
    while not schedule.is_over(age := team.agree(schedule.age_s())):
        loss, logged = run(*_batch(cutouts, shape))
        loss.backward()
        masters.step(lr_factor(schedule.progress(age), masters.steps, shape.warmup_steps), team)
        parts += logged
        counted += 1
        if masters.steps % shape.log_every == 0:
            total, l1, kl = (parts / counted).tolist()
            rate = counted * shape.vae_batch * team.size / (time.monotonic() - since)
            work.log(
                f"vae step {masters.steps} progress {schedule.progress(age):.3f} "
                f"loss {total:.4f} l1 {l1:.4f} kl {kl:.3f} {rate:.0f} images/s"
            )
            parts, counted, since = torch.zeros_like(parts), 0, time.monotonic()
        if team.rank == 0 and time.monotonic() - saved_at > SAVE_EVERY_S:
            _save(schedule, masters, file)
            saved_at = time.monotonic()
    if team.rank == 0:
        _save(schedule, masters, file)


def _save(schedule: Schedule, masters: Masters, file: Path) -> None:
    state = {"masters": masters.state_dict(), **schedule.state_dict(schedule.age_s())}
    weights.save_state(state, file)


@torch.no_grad()
def _finish(
    work: Workspace,
    shape: Shape,
    team: Team,
    vae: AutoencoderKL,
    cutouts: Cutouts,
    steps: int,
    dtype: torch.dtype,
) -> None:
    """Measure the latents of real scenes, write the weights and a sheet of reconstructions."""
    if team.rank:
        return
    torch.manual_seed(99)
    things = torch.randint(len(cutouts), (shape.chunk,), device=team.device)
    colors = torch.randint(len(captions.RGB), things.shape, device=team.device)
    images = cutouts.one(things, colors)
    means = [vae.encoder(part.to(dtype)).float().chunk(2, dim=1)[0] for part in images.split(64)]
    latents = torch.cat(means)
    facts = {
        "shift_factor": latents.mean().item(),
        "scaling_factor": 1 / latents.std().item(),
        "steps": steps,
        "images": steps * shape.vae_batch * team.size,
        "seconds": work.age_s(),
        "kl": shape.kl,
        "channel_std": [round(v, 3) for v in latents.std((0, 2, 3)).tolist()],
    }
    files = weights.save_pieces(vae.state_dict(), work.weights, STEM, facts)
    codec = Codec(work.weights, shape, team.device, dtype)
    shown = codec.reconstruct(images)
    work.log(f"vae: {psnr_db(shown, images).mean():.2f} dB in {dtype}, {facts}")
    pairs = torch.stack([images[:16], shown[:16]], dim=1).flatten(0, 1)
    sheet = save_sheet(pairs, work.root / "sheet-vae.png", columns=8)
    work.deliver([*files, sheet])
