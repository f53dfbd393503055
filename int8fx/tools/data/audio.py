"""Speech for measurements: clips of WAV files, as a speech model takes them."""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .texts import CALIBRATION_SHARE, TextError

SECONDS = 30  # of a clip, at most: what Whisper hears at once
LEAST = 0.1  # seconds of a file: the convolutions of speech models need some 25 ms


def read_audio(path: str, rate: int) -> Tensor:
    """The WAV file ``path``, 16-bit PCM, as ``[T]`` float32 in [-1, 1] with ``rate`` samples per second.

    Channels are averaged. Another rate is changed by the discrete Fourier transform: frequencies that both rates can
    hold stay, others are cut.

    Raises:
        TextError: it cannot be read, is no such file or too short.
    """
    try:
        with wave.open(str(Path(path)), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise TextError(f"cannot read the audio {path!r}: {error}; it takes a WAV file of 16-bit PCM") from error
    if width != 2 or not data:
        raise TextError(f"the audio {path!r} has {len(data)} bytes of {8 * width} bits; legal: some, of 16 bits")
    if len(data) % (2 * channels) or len(data) < 2 * channels * LEAST * own or not own:
        found = f"{len(data)} bytes for {channels} channels of 16 bits at {own} Hz"
        raise TextError(f"the audio {path!r} has {found}; legal: whole samples, {LEAST} seconds or more")
    x = torch.frombuffer(bytearray(data), dtype=torch.int16).view(-1, channels).float().mean(1) / 2**15
    count = round(len(x) * rate / own)
    return x if own == rate else torch.fft.irfft(torch.fft.rfft(x)[: count // 2 + 1], count) * (count / len(x))


def clips(model: Any, features: Any, sources: Sequence[str], calibration: int) -> tuple[list[dict], list[dict]]:
    """Clips of at most 30 seconds as arguments for ``model``: those to measure, those to calibrate on.

    A longer file becomes several of equal length: none is a few samples that were left. The last tenth of all clips,
    at least one and at most ``calibration``, is for calibration. A model that writes token by token gets the tokens
    that it writes itself as ``labels``: all of its copies then read the same.

    Args:
        model: of transformers, for sequence to sequence or CTC.
        features: its feature extractor.
        sources: WAV files.
        calibration: how many clips to calibrate on, at most.

    Raises:
        TextError: a file cannot be read, there are too few clips, or the model writes nothing for one.
    """
    rate, found = features.sampling_rate, []
    for source in sources:
        audio = read_audio(source, rate)
        for x in audio.tensor_split(math.ceil(len(audio) / (SECONDS * rate))):
            found.append(dict(features(x.numpy(), sampling_rate=rate, return_tensors="pt")))
    apart = min(calibration, max(1, round(len(found) * CALIBRATION_SHARE)))
    if len(found) - apart < 2:
        raise TextError(f"{len(found)} clips of audio are too few: it takes two to measure and {apart} to calibrate on")
    if model.config.is_encoder_decoder:
        for clip in found:
            with torch.no_grad():
                clip["labels"] = model.generate(clip[model.main_input_name])
            if not clip["labels"].numel():
                raise TextError("the model writes nothing for a clip; legal: audio in which it hears words")
    return found[: len(found) - apart], found[len(found) - apart :]
