"""Where a model comes from: the embedded `nano`, a local folder, or a repository on the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from zimage_fp8.errors import ModelError
from zimage_fp8.layout import COMPONENTS, read_object

EMBEDDED = "nano"
NANO_FOLDER = Path(__file__).resolve().parent.parent / "nano"

# Weights as safetensors only: nothing that is unpickled or executed is ever fetched.
HUB_FILES: Sequence[str] = (
    "model_index.json",
    *(f"{part}/{kind}" for part in COMPONENTS for kind in ("*.json", "*.safetensors")),
    "tokenizer/*.txt",
    "tokenizer/*.jinja",
)


def find_model(model: str) -> Path:
    """The folder of a model given as `nano`, a local folder or a Hub id `owner/name`.

    The Hub is asked through huggingface_hub, which honours HF_HOME, HF_HUB_OFFLINE and tokens.
    Raises ModelError when nothing is found or the folder is not a Z-Image pipeline.
    """
    folder = _locate(model)
    check_pipeline_folder(folder)
    return folder


def display_name(model: str) -> str:
    """The model's name for records that travel: never a path of this machine."""
    path = None if model == EMBEDDED else _local(model)
    return path.resolve().name if path else model


def _local(model: str) -> Path | None:
    """The path that `model` names, if there is one."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null character
        return None


def _locate(model: str) -> Path:
    if model == EMBEDDED:
        return NANO_FOLDER
    if path := _local(model):
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return _download(model)
    raise ModelError(
        f"model {model!r} does not exist",
        hint="give 'nano', a local diffusers folder, or a Hub id such as Tongyi-MAI/Z-Image-Turbo",
    )


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import; local models need none of it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(HUB_FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {repo!r} is neither a local folder nor available from the Hub: {first_line}",
            hint="check the name, the network, HF_HUB_OFFLINE, and HF_TOKEN for private models",
        ) from None


def check_pipeline_folder(folder: Path) -> None:
    """Raise ModelError unless `folder` is a diffusers ZImagePipeline with all its parts."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} has no model_index.json: it is not a diffusers pipeline folder",
            hint="give the folder that holds transformer/, vae/, text_encoder/ and tokenizer/",
        )
    if (found := read_object(index).get("_class_name")) != "ZImagePipeline":
        raise ModelError(f"{folder} is a {found}, expected a ZImagePipeline")
    if missing := [name for name in COMPONENTS if not (folder / name).is_dir()]:
        raise ModelError(f"{folder} lacks {', '.join(missing)}", hint="copy the whole pipeline")
