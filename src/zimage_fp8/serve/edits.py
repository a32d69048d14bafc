"""POST /v1/images/edits: a form with files, as OpenAI's client sends it, or JSON with data URLs."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from zimage_fp8.errors import UsageError
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.protocol import (
    MAX_PROMPT_LENGTH,
    EditsRequest,
    ImageReference,
    UnsupportedField,
    parse_edits_request,
    parse_size,
)
from zimage_fp8.serve.uploads import (
    from_data_url,
    mask_of,
    natural_size,
    open_picture,
    pixels_of,
)

PICTURES = ("image", "images", "mask")
MAX_FIELDS = 100
BYTES_PER_LETTER = 4

Picture = TypeVar("Picture", str, bytes)


@dataclass(frozen=True)
class Edit:
    """A parsed request and the files in it, not decoded yet."""

    wanted: EditsRequest
    image: bytes
    mask: bytes | None

    def open(self, most: tuple[int, int]) -> "Pictures":
        """The pictures, decoded, and the size to draw; `auto` is the source's, at most `most`.

        Takes up to a second. Raises UsageError when a picture cannot be used.
        """
        source = open_picture(self.image, "image")
        mask = open_picture(self.mask, "mask") if self.mask is not None else None
        is_auto = self.wanted.size == "auto"
        size = natural_size(source, most) if is_auto else parse_size(self.wanted.size)
        return Pictures(source, mask, size, self.wanted.strength_for(mask is not None))


@dataclass(frozen=True)
class Pictures:
    """What an edit starts from."""

    source: Image.Image
    mask: Image.Image | None
    size: tuple[int, int]
    strength: float

    def put_into(self, request: ImageRequest) -> ImageRequest:
        """`request`, of a size that was allowed, with its source and mask. Raises UsageError."""
        mask = mask_of(self.mask, self.source, self.size) if self.mask else None
        source = pixels_of(self.source, self.size)
        return replace(request, strength=self.strength, source=source, mask=mask)


async def parse_edit(request: Request, body: bytes) -> Edit:
    """The edit in `body`: a form when the content type says so, else JSON. Raises UsageError."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _from_form(request, body)
    wanted = parse_edits_request(body)
    images = [wanted.image] if isinstance(wanted.image, str) else wanted.image or []
    images = [*images, *(reference.image_url for reference in wanted.images or ())]
    mask = wanted.mask.image_url if isinstance(wanted.mask, ImageReference) else wanted.mask
    return Edit(
        wanted,
        from_data_url(_the_only(images), "image"),
        from_data_url(mask, "mask") if mask is not None else None,
    )


async def _from_form(request: Request, body: bytes) -> Edit:
    form = await _parsed_form(request, body)
    try:
        fields, files = await _sorted(form.multi_items())
    finally:
        await form.close()
    wanted = parse_edits_request({"prompt": "", **fields})
    if len(files["mask"]) > 1:
        raise UsageError("the mask was sent twice", param="mask")
    image = _the_only([*files["image"], *files["images"]])
    return Edit(wanted, image, files["mask"][0] if files["mask"] else None)


async def _parsed_form(request: Request, body: bytes) -> FormData:
    async def once() -> AsyncGenerator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers,
        once(),
        max_fields=MAX_FIELDS,
        max_part_size=MAX_PROMPT_LENGTH * BYTES_PER_LETTER,
    )
    parser.spool_max_size = len(body)  # in memory already; nothing of it goes to a disk
    if not body.rstrip(b"\r\n").endswith(b"--"):  # which the parser would take for its end
        raise UsageError("the form cannot be read: it breaks off before its closing boundary")
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise UsageError(f"the form cannot be read: {error.message}") from None


async def _sorted(
    parts: Sequence[tuple[str, UploadFile | str]],
) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """Text fields by name, and the files of each picture's name. Raises UsageError."""
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {name: [] for name in PICTURES}
    for sent_name, value in parts:
        name = sent_name.removesuffix("[]")
        shown = name[:60]
        if isinstance(value, UploadFile):
            if name not in files:
                raise UsageError(f"a file is not expected as {shown!r}", param=shown)
            files[name].append(await value.read())
        elif name in files:
            raise UsageError(f"{name} must be a file in a form", param=name)
        elif name in fields:
            raise UsageError(f"{shown!r} was sent twice", param=shown)
        else:
            fields[name] = value
    return fields, files


def _the_only(pictures: Sequence[Picture]) -> Picture:
    if not pictures:
        raise UsageError("image is missing: the picture to edit", param="image")
    if len(pictures) > 1:
        raise UnsupportedField(
            f"{len(pictures)} images were sent: this model edits one", param="image"
        )
    return pictures[0]
