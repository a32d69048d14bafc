"""Prompts to token ids: a tokenizer's own file and chat template, without transformers in between.

transformers computes the same ids from the same two files (the tests compare them), after an import
of nine seconds on a GPU machine whose weights were in memory after two. It also kept the threads
that read weights waiting for Python's lock.
"""

from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from zimage_fp8.errors import ModelError
from zimage_fp8.layout import read_object

TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Settings of tokenizer_config.json that would change what tokenizer.json says; Qwen's are off.
CHANGES = ("add_bos_token", "add_eos_token", "split_special_tokens")


class PromptTokenizer:
    """A prompt as a user's message in the chat template, thinking on, as token ids.

    folder: a tokenizer/ folder with tokenizer.json, tokenizer_config.json, and the template in
    chat_template.jinja or in the configuration. Raises ModelError for one that would need more.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_config(folder)
        self._tokenizer = _read_tokenizer(folder, config)
        self._variables = {name: text for name in TOKENS if (text := _content(config.get(name)))}
        # What transformers sets: it is how the templates in circulation were written.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        try:
            self._template = environment.from_string(_read_template(folder, config))
            self.encode("a red apple")
        except TemplateError as error:
            raise ModelError(f"{folder}: the chat template cannot be used: {error}") from None

    def __len__(self) -> int:
        """Token ids are below this, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The token ids of a prompt inside the chat template."""
        text = self._template.render(
            messages=[{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=True,
            **self._variables,
        )
        return tuple(self._tokenizer.encode(text).ids)


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    for name in CHANGES:
        if config.get(name):
            raise ModelError(f"{path}: {name} is {config[name]!r}, only false is supported")
    return config


def _read_tokenizer(folder: Path, config: dict[str, object]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{path} is missing",
            hint="transformers writes it: AutoTokenizer.from_pretrained(folder)."
            "save_pretrained(folder)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no type of its own
        raise ModelError(f"{path} cannot be read: {error}", hint="copy it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = config.get("added_tokens_decoder")
    for number, token in added.items() if isinstance(added, dict) else ():
        if tokenizer.id_to_token(int(number)) != _content(token):
            raise ModelError(
                f"{folder}: token {number} is {_content(token)!r} in tokenizer_config.json and "
                f"{tokenizer.id_to_token(int(number))!r} in tokenizer.json",
                hint="the two files are of different models; copy the folder again",
            )
    return tokenizer


def _read_template(folder: Path, config: dict[str, object]) -> str:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise ModelError(
            f"{folder} has no chat template: expected chat_template.jinja, or a text as "
            "chat_template in tokenizer_config.json"
        )
    return template


def _content(token: object) -> object:
    """A token is written as its text, or as an object with settings beside it."""
    return token.get("content") if isinstance(token, dict) else token
