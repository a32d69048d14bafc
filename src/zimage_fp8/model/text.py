"""The text encoder: Qwen3, run on the prompt's real tokens, up to the layer that is read.

Z-Image reads `hidden_states[-2]`, the output of the layer before the last. The encoder is causal,
so tokens after the prompt change nothing: no padding to 512. The last layer, the final norm and
the language-model head feed nothing and are never loaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from zimage_fp8.errors import ModelError, UsageError
from zimage_fp8.model.tokenizer import PromptTokenizer

MAX_TOKENS = 512


class PromptEncoder(ABC):
    """Prompts in, captions out: Qwen's chat template and vocabulary, and a Qwen3 to be chosen."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PromptTokenizer(folder / "tokenizer")
        # A request asks for its prompt's tokens at every stage; the template costs 0.2 ms a time.
        self.tokens = lru_cache(maxsize=64)(self._tokens)

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        """Token ids of the prompt inside Qwen's chat template (thinking on).

        Raises UsageError for prompts of more than 512 tokens: nothing is cut silently.
        """
        ids = self.tokenizer.encode(prompt)
        if len(ids) > MAX_TOKENS:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, at most {MAX_TOKENS} are read; shorten it",
                param="prompt",
            )
        return ids

    @abstractmethod
    def encode(self, prompt: str) -> Tensor:
        """The caption of one prompt, [tokens, cap_feat_dim] in the model's dtype."""

    @abstractmethod
    def describe(self) -> str:
        """What encodes, in a few words, for the record."""


class TextEncoder(PromptEncoder):
    """transformers' Qwen3, on any device: the reference."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(folder)
        self.model = _load_qwen3(folder / "text_encoder", dtype).to(device)
        self.device = device

    def describe(self) -> str:
        return "transformers"

    def encode(self, prompt: str) -> Tensor:
        ids = torch.tensor([self.tokens(prompt)], device=self.device)
        caption: Tensor = self.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        return caption


def _load_qwen3(folder: Path, dtype: torch.dtype) -> nn.Module:
    # 3 s of processor time that the fused engine does not spend
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3":
        raise ModelError(f"{folder} is a {config.model_type} model, expected qwen3")
    config.num_hidden_layers -= 1
    config.layer_types = config.layer_types[:-1]
    with _quiet():  # the layer left out is reported as unexpected
        model, report = AutoModel.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    if problems := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ModelError(f"{folder}: missing or mis-shaped tensors: {', '.join(problems[:5])}")
    model.norm = nn.Identity()  # so last_hidden_state is what hidden_states[-2] was
    module: nn.Module = model.eval()
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()
