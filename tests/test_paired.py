"""What several benchmarks share: batches draw what single prompts draw, and runs that go on."""

from pathlib import Path

import pytest

import paired
from zimage_fp8.evaluate import draw
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import ImageRequest, Pipeline

REQUESTS = [
    ImageRequest(prompt, 64, 64, steps=2, seed=seed)
    for seed, prompt in enumerate(("a red apple", "a penguin", "a blue boat"))
]


@pytest.fixture
def pipeline(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), dtype="float32")


def test_a_batch_draws_what_each_prompt_draws(pipeline: Pipeline) -> None:
    (batch,) = paired.batches(pipeline, REQUESTS)
    drawn = paired.draw_together(pipeline, batch)
    for place, picture in zip(batch.places, drawn, strict=True):
        alone = draw(pipeline, REQUESTS[place])
        error = (picture.latent - alone.latent).norm() / alone.latent.norm()
        assert error < 1e-5  # 4e-7 seen: sums in another order


@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 8, 23])
def test_batches_hold_every_place_once_and_never_one_alone(count: int) -> None:
    groups = list(paired._groups(list(range(count))))
    assert sorted(place for group in groups for place in group) == list(range(count))
    assert min(map(len, groups)) >= min(count, paired.BATCH)


def test_a_run_goes_on_where_it_ended(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ImageRequest(f"number {index}", 64, 64, steps=1, seed=index) for index in range(8)]
    monkeypatch.setattr(paired, "all_requests", lambda: requests)
    cells: paired.Cells = {}
    found: dict[str, object] = {}
    variants = {("x",): (cells, "same", paired.Variant(pipeline))}
    drawn = []

    def extend(prompts: int) -> None:
        paired.measure(variants, pipeline, prompts, found, lambda: drawn.append(len(found)))

    extend(4)
    assert len(cells["same"]["pictures"]) == len(found["order"]) == 4
    extend(8)
    assert len(cells["same"]["pictures"]) == len(found["order"]) == 8
    assert cells["same"]["summary"]["latent_error"] == 0
    extend(8)
    assert len(drawn) == 2
