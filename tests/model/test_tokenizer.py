"""Token ids against transformers', and which tokenizers are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer

from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer
from zimage_fp8.errors import ModelError
from zimage_fp8.model.source import NANO_FOLDER
from zimage_fp8.model.tokenizer import PromptTokenizer

PROMPTS = (
    "a red apple",
    "  Two  spaces,\ttabs\r\n\r\nand lines \n",
    "it's 12,345.67 € – “quoted”, isn't it? THEY'LL see; we've 7x7=49",
    "caf\u00e9 and cafe\u0301, \u1100\u1161\u11a8 (decomposed), \ufb01",
    "一只红色的苹果，放在青色的桌子上。Привет мир! नमस्ते 👩‍🚀🍎",
    "<|im_end|>\n<|im_start|>assistant\n<think>now</think><|endoftext|> <|im_start",
    "{{ message }} {% if true %}x{% endif %} {# gone? #} & <b> \\n",
    "a" * 400,
)
TEXT = [
    "a red apple, it's on the table; they'll see 12345 apples & 67 pears. café 苹果 苹果",
    *PROMPTS,
]


def nano(folder: Path) -> None:
    shutil.copytree(NANO_FOLDER / "tokenizer", folder)


def bytewise(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)


def qwen(folder: Path) -> None:
    """Qwen's class, so with its normalization and its way to cut a text into words; a vocabulary
    of our own, and what a configuration of older transformers says about added tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    trained.train_from_iterator(TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS[1:3])})
    tokenizer.add_tokens(list(SPECIAL_TOKENS[3:]))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    (folder / "chat_template.jinja").unlink()
    change(folder, chat_template=CHAT_TEMPLATE, added_tokens_decoder=decoder_of(folder))


def decoder_of(folder: Path) -> dict[str, object]:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}


def change(folder: Path, **settings: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("write", [nano, bytewise, qwen])
def test_ids_are_those_of_transformers(write: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    write(folder)
    ours, theirs = PromptTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs)
    for prompt in PROMPTS:
        text = theirs.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        assert ours.encode(prompt) == tuple(theirs(text).input_ids), prompt
    assert len({ours.encode(prompt) for prompt in PROMPTS}) == len(PROMPTS)


def test_settings_of_another_use_cut_and_pad_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    nano(folder)
    expected = PromptTokenizer(folder).encode(PROMPTS[-1])
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(8)
    stored.enable_padding(length=1000)
    stored.save(str(folder / "tokenizer.json"))
    assert PromptTokenizer(folder).encode(PROMPTS[-1]) == expected


def test_templates_see_special_tokens_and_thinking(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    bytewise(folder)
    (folder / "chat_template.jinja").unlink()
    template = "{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ enable_thinking }}"
    change(
        folder,
        chat_template=template,
        eos_token={"content": "<|im_end|>", "lstrip": False},
        bos_token=None,
    )
    ids = PromptTokenizer(folder).encode("unused")
    assert ids[:2] == (258, 256)
    assert len(ids) == 2 + len("True")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewritten(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_text(text)] and None


def with_settings(**settings: object) -> Callable[[Path], None]:
    return lambda folder: change(folder, **settings)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (without("tokenizer_config.json"), "tokenizer_config.json is missing"),
        (without("chat_template.jinja"), "has no chat template"),
        (rewritten("tokenizer.json", '{"version": "1.0"}'), "tokenizer.json cannot be read"),
        (rewritten("tokenizer_config.json", "[]"), "holds a list, expected an object"),
        (rewritten("chat_template.jinja", "{% for %}"), "the chat template cannot be used"),
        (rewritten("chat_template.jinja", "{{ messages[0].role.x.y }}"), "cannot be used"),
        (rewritten("chat_template.jinja", "{{ ().__class__.mro() }}"), "cannot be used"),
        (with_settings(add_bos_token=True), "add_bos_token is True, only false is supported"),
        (with_settings(split_special_tokens=True), "split_special_tokens is True"),
        (
            with_settings(added_tokens_decoder={"1": {"content": "<|other|>"}}),
            "token 1 is '<|other|>' in tokenizer_config.json and '<|im_start|>'",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    nano(folder)
    damage(folder)
    with pytest.raises(ModelError, match=re.escape(says)):
        PromptTokenizer(folder)
