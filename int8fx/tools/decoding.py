"""Decoding token by token with a static cache: its shapes do not change, as torch.compile requires."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class StaticDecoder:
    """Reads a prompt, then one token a call.

    Args:
        model: a language model of transformers, with or without its head; it reads the prompt.
        step: ``model`` or its compiled form; it reads the tokens.
        prompt: ``[B, P]`` token ids.
        tokens: how many tokens the cache holds after the prompt.
    """

    def __init__(self, model: Any, step: Callable[..., Any], prompt: Tensor, tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.step, self.prompt, self.tokens = model, step, prompt, tokens
        self.cache: Any = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
        self.free = 0

    def start(self) -> Any:
        """Empties the cache and reads the prompt; returns the model's output."""
        self.cache.reset()
        self.free = self.tokens
        return self.model(input_ids=self.prompt, past_key_values=self.cache)

    def __call__(self, token: Tensor) -> Any:
        """Reads ``token [B, 1]``, after a new start if the cache is full; returns the model's output."""
        if not self.free:
            self.start()
        self.free -= 1
        return self.step(input_ids=token, past_key_values=self.cache)


def greedy(decoder: StaticDecoder) -> list[int]:
    """The likeliest tokens after a prompt ``[1, P]``, as many as the cache holds."""
    logits, ids = decoder.start().logits, []
    while True:
        token = logits[:, -1:].argmax(-1)
        ids.append(int(token))
        if len(ids) == decoder.tokens:
            return ids
        logits = decoder(token).logits
