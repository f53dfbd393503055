"""Speech: clips of WAV files, word errors, and `int8fx eval` of models that write speech."""

from __future__ import annotations

import json
import math
import wave
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import save_audio, save_lm, save_wav2vec2, save_whisper

import int8fx
from int8fx.tools import cli, metrics
from int8fx.tools.data.audio import clips, read_audio
from int8fx.tools.data.models import load
from int8fx.tools.data.texts import TextError
from int8fx.tools.evaluate import evaluate, float_copy

words = st.lists(st.sampled_from("abc"), max_size=6)


# ---- word errors ----------------------------------------------------------------------------------------------------


@given(words, words)
def test_word_errors_are_the_shortest_way_from_one_to_the_other(a, b):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert metrics.word_errors(a, b) == distance(len(a), len(b))


# ---- files ----------------------------------------------------------------------------------------------------------


def tone(path: Path, rate: int, frequency: float, channels: int = 1) -> Path:
    t = torch.arange(rate, dtype=torch.float64) / rate
    x = (16000 * torch.sin(2 * math.pi * frequency * t)).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(x[:, None].expand(-1, channels).contiguous().numpy().tobytes())
    return path


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_tones_are_the_same_tones_at_another_rate(rate, channels, tmp_path):
    x = read_audio(str(tone(tmp_path / "a.wav", rate, 440.0, channels)), 16000)
    t = torch.arange(16000, dtype=torch.float64) / 16000
    expected = 16000 / 2**15 * torch.sin(2 * math.pi * 440 * t)
    assert x.shape == (16000,)
    assert (x - expected).abs().max() < 2**-15 + 1e-4  # samples are rounded to 16 bits; sums in float32


def test_frequencies_that_the_rate_cannot_hold_are_cut(tmp_path):
    x = read_audio(str(tone(tmp_path / "a.wav", 48000, 12000.0)), 16000)
    assert x.abs().max() < 1e-4


@pytest.mark.parametrize("content", [b"", b"RIFF no wave", None])
def test_other_files_are_named(content, tmp_path):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=r"cannot read the audio .*a\.wav'.*it takes a WAV file of 16-bit PCM"):
        read_audio(str(path), 16000)


def test_empty_files_and_other_widths_are_named(tmp_path):
    with pytest.raises(TextError, match="has 0 bytes of 16 bits; legal: some, of 16 bits"):
        read_audio(str(save_audio(tmp_path / "a.wav", 0)), 16000)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(16000)
        file.writeframes(bytes(100))
    with pytest.raises(TextError, match="has 100 bytes of 8 bits; legal"):
        read_audio(str(tmp_path / "b.wav"), 16000)


def test_broken_and_tiny_files_are_named(tmp_path):
    """Cut within a sample, without a rate, shorter than any model hears."""
    whole = save_audio(tmp_path / "a.wav", 0.5).read_bytes()
    stopped = whole[:24] + bytes(4) + whole[28:]  # the rate
    tiny = save_audio(tmp_path / "a.wav", 0.05).read_bytes()
    for content, found in ((whole[:-1], "15999 bytes"), (stopped, "at 0 Hz"), (tiny, "1600 bytes")):
        (tmp_path / "b.wav").write_bytes(content)
        with pytest.raises(TextError, match=rf"b\.wav' has .*{found}.*; legal: whole samples, 0\.1 seconds or more"):
            read_audio(str(tmp_path / "b.wav"), 16000)


def test_long_files_are_clips_of_equal_length(tmp_path):
    """The 31st second is no clip of its own, whose few samples no convolution would take."""
    model, (features, _), _ = load(str(save_wav2vec2(tmp_path / "wav2vec2")))
    measured, apart = clips(model, features, [str(save_audio(tmp_path / "a.wav", 60.001))], 8)
    lengths = [clip["input_values"].shape[1] for clip in measured + apart]
    assert (len(lengths), sum(lengths)) == (3, 960016)
    assert max(lengths) - min(lengths) <= 1


# ---- models ---------------------------------------------------------------------------------------------------------

SAVE = {"whisper": save_whisper, "wav2vec2": save_wav2vec2}
SCHEMES = {"llm_int8": int8fx.llm_int8(), "plain": int8fx.rotated(16, 0)}


@pytest.mark.parametrize("name", SAVE)
def test_figures_are_those_of_the_converted_model(name, tmp_path):
    model, (features, tokenizer), kind = load(str(SAVE[name](tmp_path / name)))
    assert kind == "speech"
    sources = [str(save_audio(tmp_path / f"{i}.wav", 0.8, seed=i)) for i in range(3)]
    measured, apart = clips(model, features, sources, 8)
    assert (len(measured), len(apart)) == (2, 1)
    found = evaluate(model, kind, measured, SCHEMES, calibration=apart, decode=tokenizer.decode)
    twin = int8fx.convert(float_copy(model), SCHEMES["plain"])
    kl, changed, count = [], 0, 0
    with torch.no_grad():
        for clip in measured:
            kl.append(metrics.kl_divergence(model(**clip).logits[0], twin(**clip).logits[0]))
            audio = clip[model.main_input_name]
            ids = [m.generate(audio) if name == "whisper" else m(audio).logits.argmax(-1) for m in (model, twin)]
            texts = [tokenizer.decode(i[0]).split() for i in ids]
            changed, count = changed + metrics.word_errors(*texts), count + len(texts[0])
    measured_by = found.results["plain"].metrics
    assert measured_by["KL mean"].value == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5, abs=1e-8)
    assert measured_by["words changed"].value == pytest.approx(changed / max(count, 1))
    assert found.results["plain"].converted == found.results["llm_int8"].converted > 5


@pytest.mark.parametrize("name", SAVE)
def test_the_commands_read_audio(name, tmp_path, capsys):
    model, path = str(SAVE[name](tmp_path / name)), tmp_path / "found.json"
    audio = ["--audio", *(str(save_audio(tmp_path / f"{i}.wav", 0.5, seed=i)) for i in range(3))]
    schemes = ["--scheme", "llm_int8", "--scheme", "rotated"]
    assert cli.main(["eval", "--model", model, *audio, *schemes, "--json", str(path)]) == 0
    assert "2 clips of speech" in capsys.readouterr().out
    assert "words changed" in json.loads(path.read_text())["results"]["rotated"]["metrics"]
    assert cli.main(["inspect", "--model", model, *audio, *schemes]) == 0
    assert "error rotated" in capsys.readouterr().out


def test_clips_without_words_are_refused(tmp_path, monkeypatch):
    model, (features, _), _ = load(str(save_whisper(tmp_path / "whisper")))
    monkeypatch.setattr(model, "generate", lambda x: torch.zeros(1, 0, dtype=torch.long))
    sources = [str(save_audio(tmp_path / f"{i}.wav", 0.5)) for i in range(2)]
    with pytest.raises(TextError, match="the model writes nothing for a clip"):
        clips(model, features, sources, 0)


def test_models_get_what_they_read(tmp_path, capsys):
    audio = str(save_audio(tmp_path / "a.wav", 0.5))
    assert cli.main(["eval", "--model", str(save_lm(tmp_path / "lm")), "--audio", audio]) == 1
    assert "is a model of kind lm; legal: --text FILE, no --audio" in capsys.readouterr().err
    whisper = str(save_whisper(tmp_path / "whisper"))
    assert cli.main(["eval", "--model", whisper]) == 1
    assert "is a model of kind speech; legal: --audio FILE" in capsys.readouterr().err
    assert cli.main(["eval", "--model", whisper, "--audio", audio, "--text", "pydoc"]) == 1
    assert "is a model of kind speech; legal: --audio FILE ..., no --text" in capsys.readouterr().err
    assert cli.main(["eval", "--model", whisper, "--audio", audio]) == 1
    assert "1 clips of audio are too few" in capsys.readouterr().err
    assert cli.main(["demo", "--model", whisper]) == 1
    assert "writes speech; the demo takes language models" in capsys.readouterr().err
