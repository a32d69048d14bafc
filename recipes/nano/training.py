"""Training the transformer and the text encoder together, on cached latents."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.nano import captions, denoiser, weights
from recipes.nano.autoencoder import SAVE_EVERY_S, Codec
from recipes.nano.captions import Scene
from recipes.nano.compiling import try_compiled
from recipes.nano.denoiser import Denoiser, flow_loss, sample
from recipes.nano.latents import LatentCache
from recipes.nano.masters import Masters
from recipes.nano.rows import RowQueue
from recipes.nano.scenes import Cutouts
from recipes.nano.schedule import Schedule, lr_factor
from recipes.nano.shape import LATENT_CHANNELS, LATENT_SIZE, LONG, SHORT, Shape
from recipes.nano.sheets import save_sheet
from recipes.nano.team import Team
from recipes.nano.tokenizer import Captioner
from recipes.nano.workspace import Workspace

REFRESH_SHARE = 0.10  # of the time goes into new latents
LONG_EVERY = 9, 2  # of every 9 batches 2 have long captions: 22 %


@dataclass
class Training:
    """What one run holds in its hands."""

    work: Workspace
    shape: Shape
    team: Team
    captioner: Captioner
    model: Denoiser
    masters: Masters
    schedule: Schedule
    cache: LatentCache

    @property
    def file(self) -> Path:
        return self.work.state / "train.pt"


def train_denoiser(
    work: Workspace,
    shape: Shape,
    team: Team,
    seconds: float,
    total_seconds: float,
    *,
    dtype: torch.dtype,
    compiled: bool,
    start_from: Path | None = None,
) -> None:
    """Train for `seconds` of a schedule over `total_seconds`, and write the averaged weights.

    Goes on from the saved state if there is one, else from BF16 weights in `start_from` if given
    (their optimizer state is lost), else from scratch.
    """
    run = _set_up(work, shape, team, seconds, total_seconds, dtype, start_from)
    try:
        if compiled:
            _compile(run)
        run.cache.fill(shape.first_rows)
        work.log(f"{run.cache.filled} latents, {run.cache.chunk / run.cache.chunk_s:.0f} rows/s")
        run.schedule.begin()
        _loop(run)
    finally:
        run.cache.queue.close()
    _finish(run, dtype)


def _set_up(
    work: Workspace,
    shape: Shape,
    team: Team,
    seconds: float,
    total_seconds: float,
    dtype: torch.dtype,
    start_from: Path | None,
) -> Training:
    torch.backends.cudnn.benchmark = True
    things = captions.load_things(work.data, shape.num_objects)
    captioner = Captioner(work.data, things)
    cutouts = Cutouts(work.data, things, team.device)
    combinations = captions.combine(cutouts.mean_rgb())
    torch.manual_seed(0)
    model = Denoiser(shape, captioner.vocab_size).to(team.device)
    facts = {}
    file = work.state / "train.pt"
    if start_from and not file.exists():
        state, facts = weights.load_pieces(start_from, denoiser.STEM)
        model.load_state_dict(state)
        for piece in start_from.glob("vae-*.safetensors"):
            if not (work.weights / piece.name).exists():
                shutil.copyfile(piece, work.weights / piece.name)
    masters = Masters(
        model.trained_parameters(), dtype, lr=shape.lr, betas=(0.9, 0.95), weight_decay=0.01,
        ema=shape.ema,
    )  # fmt: skip
    weights.set_dtype(model, dtype)
    if file.exists():
        facts = torch.load(file, map_location=team.device)
        masters.load_state_dict(facts["masters"])
    masters.steps = facts.get("steps", masters.steps)
    spent, done = facts.get("spent_s", 0.0), facts.get("done", 0.0)
    schedule = Schedule(work.started, seconds, total_seconds, spent, done)
    torch.manual_seed(1 + team.rank + 1000 * masters.steps)
    queue = RowQueue(
        work.data, shape.num_objects, combinations.trained, shape.chunk, (team.rank, masters.steps)
    )
    codec = Codec(work.weights, shape, team.device, dtype)
    cache = LatentCache(shape, codec, cutouts, queue)
    work.log(
        f"{len(things)} objects, {combinations.allowed.sum()} combinations, "
        f"{combinations.held_out.sum()} held out, vocabulary {captioner.vocab_size}"
    )
    for name, part in (("transformer", model.transformer), ("text encoder", model.text_encoder)):
        work.log(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters")
    work.log(f"{team.size} x {team.device}, from step {masters.steps}, progress {done:.3f}")
    return Training(work, shape, team, captioner, model, masters, schedule, cache)


def _compile(run: Training) -> None:
    """Compile every shape that training will meet, before the schedule starts."""
    images = run.cache.next_images()
    run.cache.codec.compile_encoder(run.work, images)
    latent = torch.randn(
        run.shape.batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, device=run.team.device
    )
    run.model.compile_blocks()

    def attempt() -> None:
        for bucket in (SHORT, LONG):
            ids = torch.zeros(run.shape.batch, bucket, dtype=torch.int64, device=latent.device)
            flow_loss(run.model, latent, ids).backward()
        if latent.is_cuda:
            torch.cuda.synchronize()
        run.masters.drop_gradients()

    try_compiled(run.work, "denoiser blocks", attempt, run.model.run_eagerly)


def bucket_of(step: int) -> int:
    """The same on all GPUs, so that none waits for another's longer batch."""
    period, num_long = LONG_EVERY
    return LONG if step * num_long % period < num_long else SHORT


def _loop(run: Training) -> None:
    shape, masters, schedule, cache = run.shape, run.masters, run.schedule, run.cache
    empty = torch.from_numpy(run.captioner.encode([""], SHORT)[0]).to(run.team.device).long()
    loss_sum = torch.zeros((), device=run.team.device)
    counted, since, saved_at, chunks = 0, time.monotonic(), time.monotonic(), 0
    while not schedule.is_over(age := run.team.agree(schedule.age_s())):
        if chunks * cache.chunk_s < REFRESH_SHARE * schedule.trained_s(schedule.age_s()):
            cache.refresh()
            chunks += 1
        latent, ids = cache.batch(shape.batch, bucket_of(masters.steps), empty)
        loss = flow_loss(run.model, latent, ids)
        loss.backward()
        progress = schedule.progress(age)
        masters.step(lr_factor(progress, masters.steps, shape.warmup_steps), run.team)
        loss_sum += loss.detach()
        counted += 1
        if masters.steps % shape.log_every == 0:
            images = counted * shape.batch * run.team.size
            share = chunks * cache.chunk_s / schedule.trained_s(schedule.age_s())
            run.work.log(
                f"train step {masters.steps} progress {progress:.3f} "
                f"loss {(loss_sum / counted).item():.4f} "
                f"{images / (time.monotonic() - since):.0f} images/s, "
                f"{cache.written} latents in {share:.0%} of the time"
            )
            loss_sum.zero_()
            counted, since = 0, time.monotonic()
        if run.team.rank == 0 and time.monotonic() - saved_at > SAVE_EVERY_S:
            _save(run)
            saved_at = time.monotonic()
    if run.team.rank == 0:
        _save(run)


def _save(run: Training) -> None:
    progress = run.schedule.state_dict(run.schedule.age_s())
    weights.save_state({"masters": run.masters.state_dict(), **progress}, run.file)


def _finish(run: Training, dtype: torch.dtype) -> None:
    if run.team.rank:
        return
    run.masters.use_average()
    run.model.run_eagerly()
    steps = run.masters.steps
    facts = {
        "steps": steps,
        "images": steps * run.shape.batch * run.team.size,
        "gpus": run.team.size,
        "device": _device_name(run.team.device),
        **run.schedule.state_dict(run.schedule.age_s()),
    }
    files = weights.save_pieces(run.model.state_dict(), run.work.weights, denoiser.STEM, facts)
    run.work.log(f"trained: {facts}")
    run.work.deliver([*files, _preview(run)])


def _preview(run: Training) -> Path:
    """Sixteen prompts, half of them pairs, to see at once whether it works."""
    things = run.captioner.things
    prompts = []
    for number in range(16):
        first = number * len(things) // 16
        second = (first + len(things) // 2) % len(things) if number % 2 else None
        prompts.append(captions.short_captions(Scene(first, number, second), things)[0])
    ids = torch.from_numpy(run.captioner.encode(prompts, SHORT)).long().to(run.team.device)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(16, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
    images = run.cache.codec.decode(sample(run.model, ids, noise.to(run.team.device)))
    return save_sheet(images, run.work.root / "sheet-one.png", columns=4, captions=prompts)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
