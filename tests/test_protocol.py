"""The wire types alone; tests/serve/test_app.py has them behind a socket."""

import pytest

from zimage_fp8.errors import UsageError
from zimage_fp8.protocol import ImagesAnswer, parse_images_request, parse_size


def test_a_prompt_is_enough() -> None:
    request = parse_images_request(b'{"prompt": "x"}')
    assert (request.n, request.size, request.seed) == (1, "auto", None)
    assert (request.num_inference_steps, request.guidance_scale) == (8, 0.0)


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(UsageError, match=r"n: .*less than or equal to 10") as refused:
        parse_images_request(b'{"prompt": "x", "n": 11}')
    assert refused.value.param == "n"


@pytest.mark.parametrize("text", ["1024x512", "1024X512", "1024×512", " 1024x512 "])
def test_sizes(text: str) -> None:
    assert parse_size(text) == (1024, 512)


@pytest.mark.parametrize(
    "text", ["", "x", "1024", "1024x", "x512", "-1x2", "1e3x2", "1x2x3", "9" * 40]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text)
    assert refused.value.param == "size"


def test_another_servers_answer_can_be_read() -> None:
    answer = ImagesAnswer.model_validate_json(
        '{"created": 1, "data": [{"b64_json": "AA==", "url": null}], "metrics": {"a": 1}}'
    )
    assert answer.data[0].b64_json == "AA=="
    assert answer.zimage_fp8 is None
