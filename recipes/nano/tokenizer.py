"""A byte-level BPE in which every word of a label or template is one token.

Other text still encodes, by pieces or bytes. Ids 0, 1, 2 are Qwen's special tokens, and the chat
template is Qwen's for one user turn.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recipes.nano import captions
from recipes.nano.captions import Scene, Thing
from recipes.nano.shape import LONG, SHORT
from recipes.nano.workspace import Workspace

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAD = 0
CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VARIANTS = 3  # captions kept per scene and bucket


def train_tokenizer(work: Workspace) -> None:
    """Merge until every word is one token: the vocabulary has no other limit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = sorted(known_words(captions.load_things(work.data, None)))
    tokenizer.train_from_iterator(words, trainer)
    split = [word for word in words if len(tokenizer.encode(word).ids) != 1]
    if split:
        raise ValueError(f"words of more than one token: {split[:5]}")
    tokenizer.save(str(work.data / "tokenizer.json"))
    work.log(f"{len(words)} words, {tokenizer.get_vocab_size()} tokens")


def known_words(things: list[Thing]) -> frozenset[str]:
    """Words of labels, colours, templates and phrases, as the pre-tokenizer splits them."""
    texts = [thing.name for thing in things] + list(captions.COLORS) + list(captions.PHRASES)
    for templates in (captions.SHORT_ONE, captions.SHORT_TWO, captions.LONG_ONE, captions.LONG_TWO):
        texts += [template.format(n="", m="", a="a", b="an", c="", k="") for template in templates]
    texts += ["user assistant"]
    split = pre_tokenizers.Whitespace().pre_tokenize_str
    return frozenset(word for text in texts for word, _ in split(text.lower()))


class Captioner:
    """Turns scenes into rows of token ids, padded to their bucket."""

    def __init__(self, data: Path, things: list[Thing]) -> None:
        self.tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self.things = things
        self.known = known_words(things)
        self.num_tokens = lru_cache(maxsize=None)(self._num_tokens)

    @property
    def vocab_size(self) -> int:
        """Rounded up to a multiple of 64, as matrix shapes like it."""
        return -(-self.tokenizer.get_vocab_size() // 64) * 64

    def encode(self, prompts: list[str], bucket: int) -> np.ndarray:
        """Token ids int16 [prompts, bucket], chat template included; raises when one is longer."""
        encoded = self.tokenizer.encode_batch(
            [CHAT.format(prompt=prompt) for prompt in prompts], add_special_tokens=False
        )
        ids = np.full((len(prompts), bucket), PAD, np.int16)
        for row, item in enumerate(encoded):
            if len(item.ids) > bucket:
                raise ValueError(f"{len(item.ids)} tokens, more than {bucket}: {prompts[row]!r}")
            ids[row, : len(item.ids)] = item.ids
        return ids

    def short(self, scene: Scene, rng: np.random.Generator, count: int = 1) -> list[str]:
        """`count` captions of at most 32 tokens."""
        fitting = [
            text
            for text in captions.short_captions(scene, self.things)
            if self.num_tokens("") + self.num_words(text) <= SHORT
        ]
        return [fitting[i] for i in rng.integers(0, len(fitting), count)]

    def long(self, scene: Scene, rng: np.random.Generator) -> str:
        """One caption of 33 to 64 tokens."""
        sentence, *more = captions.long_pieces(scene, self.things, self.known, rng)
        target = int(rng.integers(SHORT + 1, LONG - 5))
        text, length = sentence, self.num_tokens("") + self.num_words(sentence)
        for piece in more:
            added = 1 + self.num_words(piece)  # the comma is a token
            if length >= target:
                break
            if length + added <= LONG:
                text, length = f"{text}, {piece}", length + added
        return text

    def num_words(self, text: str) -> int:
        """Tokens of a text without the chat template. Words never merge across spaces."""
        return sum(self.num_tokens(word) - self.num_tokens("") for word in text.split())

    def _num_tokens(self, prompt: str) -> int:
        return len(self.tokenizer.encode(CHAT.format(prompt=prompt), add_special_tokens=False).ids)

    def rows(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """int16 [scenes, VARIANTS, 32] and [scenes, VARIANTS, 64]."""
        short = [text for scene in scenes for text in self.short(scene, rng, VARIANTS)]
        long = [self.long(scene, rng) for scene in scenes for _ in range(VARIANTS)]
        shape = (len(scenes), VARIANTS, -1)
        return self.encode(short, SHORT).reshape(shape), self.encode(long, LONG).reshape(shape)
