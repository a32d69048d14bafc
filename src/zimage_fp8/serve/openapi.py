"""What /openapi.json tells about routes whose bodies are parsed, and answers joined, by us.

FastAPI would document its own 422 and an answer of any shape; these are the truth. Each constant
holds keyword arguments of `add_api_route`.
"""

from typing import Any

from pydantic import BaseModel

from zimage_fp8.protocol import EditsRequest, ErrorAnswer, ImagesAnswer, ImagesRequest

FILES = {f"image/{name}": {"schema": {"type": "string"}} for name in ("png", "webp", "jpeg")}
FILE_IN_A_FORM = {"type": "string", "format": "binary"}

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be answered as it is."},
    "5XX": {"model": ErrorAnswer, "description": "The server failed, or takes no requests now."},
}
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesAnswer,
        "description": "Pictures: JSON, or one file by `Accept: image/…`, or a stream of events.",
        "content": {**FILES, "text/event-stream": {"schema": {"type": "string"}}},
    },
    **ERRORS,
}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of `model` with its definitions in place, as OpenAPI needs it."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolved(definitions[part["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in part.items()}

    whole: dict[str, Any] = resolved(schema)
    return whole


def _form() -> dict[str, Any]:
    """The body of an edit as a form: its text fields, and files where JSON has data URLs."""
    schema = _schema(EditsRequest)
    files = {"image": FILE_IN_A_FORM, "mask": FILE_IN_A_FORM}
    fields = {name: it for name, it in schema["properties"].items() if name != "images"}
    return {**schema, "properties": {**fields, **files}, "required": ["prompt", "image"]}


def _body(**content: dict[str, Any]) -> dict[str, Any]:
    media_types = {"json": "application/json", "form": "multipart/form-data"}
    return {
        "requestBody": {
            "required": True,
            "content": {media_types[kind]: {"schema": it} for kind, it in content.items()},
        }
    }


GENERATION: dict[str, Any] = {
    "openapi_extra": _body(json=_schema(ImagesRequest)),
    "responses": DRAWN,
}
EDIT: dict[str, Any] = {
    "openapi_extra": _body(json=_schema(EditsRequest), form=_form()),
    "responses": DRAWN,
}
PICTURE: dict[str, Any] = {
    "responses": {200: {"content": FILES, "description": "The picture's bytes."}, **ERRORS}
}
PLAIN: dict[str, Any] = {"responses": ERRORS}
TEXT: dict[str, Any] = {
    "responses": {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text."},
        **ERRORS,
    }
}
