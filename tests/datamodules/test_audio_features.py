import math
import sys

import numpy as np
import pytest
import torch
from manifest_cases import write_wave
from torchaudio.transforms import MelSpectrogram

from ds_lightning.datamodules.audio_features import LogMel, check_soundfile, read_audio, resample
from ds_lightning.errors import ConfigError


def tone(rate, seconds=0.5, hertz=440.0):
    return np.sin(2 * math.pi * hertz * np.arange(int(rate * seconds)) / rate) * 0.5


def test_a_wave_of_the_standard_library_is_read_exactly(tmp_path):
    samples = tone(8000)
    read = read_audio(write_wave(tmp_path / "a.wav", samples), 8000, max_seconds=9)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.numpy(), np.round(samples * 32767).astype(np.float32) / 32768, atol=0, rtol=0)


def test_channels_are_averaged_and_the_end_is_cut_off(tmp_path):
    left, right = tone(8000), tone(8000, hertz=100)
    path = write_wave(tmp_path / "a.wav", np.stack([left, right], 1), channels=2)
    read = read_audio(path, 8000, max_seconds=0.25)
    assert len(read) == 2000
    np.testing.assert_allclose(read.numpy(), ((left + right) / 2)[:2000], atol=5e-5)


@pytest.mark.parametrize("rate", [44_100, 8000, 11_127, 44_101])
def test_a_tone_stays_the_same_tone_at_another_rate(tmp_path, rate):
    read = read_audio(write_wave(tmp_path / "a.wav", tone(rate), rate), 16_000, max_seconds=1)
    wanted = tone(16_000)[: len(read)]
    assert abs(len(read) - 8000) <= 1
    inner = slice(200, 7800)  # the filter reaches past the ends of the wave
    np.testing.assert_allclose(read.numpy()[inner], wanted[inner], atol=5e-3)


def test_a_single_sample_survives_resampling():
    assert len(resample(torch.ones(1), 48_000, 16_000)) == 1


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_other_formats(tmp_path, kind):
    import soundfile

    path = tmp_path / f"a.{kind.lower()}"
    soundfile.write(path, tone(16_000), 16_000, format=kind)
    read = read_audio(path, 16_000, max_seconds=1)
    spectrum = torch.fft.rfft(read).abs()
    assert abs(int(spectrum.argmax()) / len(read) * 16_000 - 440) < 5


@pytest.mark.parametrize(("rate", "mels", "window", "hop"), [(16_000, 40, 32.0, 10.0), (8000, 8, 32.0, 7.0)])
def test_log_mel_agrees_with_torchaudio(rate, mels, window, hop):
    wave = torch.randn(3001, generator=torch.Generator().manual_seed(0)) * 0.1
    ours = LogMel(rate, mels, window, hop)
    theirs = MelSpectrogram(
        rate,
        n_fft=ours.size,
        win_length=round(window * rate / 1000),
        hop_length=round(hop * rate / 1000),
        n_mels=mels,
        pad_mode="constant",
    )
    torch.testing.assert_close(ours(wave), theirs(wave).clamp_min(1e-6).log(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rate", "mels"), [(16_000, 40), (8000, 40), (1000, 128), (48_000, 128)])
def test_no_band_is_zero_whatever_it_is_given(recwarn, rate, mels):
    features = LogMel(rate, mels, window_ms=20.0)
    noise = torch.randn(rate, generator=torch.Generator().manual_seed(0))
    assert bool((features(noise).amax(1) > math.log(1e-6)).all())
    assert not [warning for warning in recwarn if "mel" in str(warning.message)]


def test_silence_and_the_shortest_clip_are_finite():
    features = LogMel(16_000, 40)
    assert features(torch.zeros(1)).shape == (40, 1)
    torch.testing.assert_close(features(torch.zeros(320)), torch.full((40, 3), math.log(1e-6)))


def broken_files(folder):
    import soundfile

    whole = write_wave(folder / "whole.wav", tone(8000)).read_bytes()
    soundfile.write(folder / "whole.flac", tone(8000), 8000)
    soundfile.write(folder / "whole.mp3", tone(8000), 8000)
    nan = np.zeros(100, np.float32)
    nan[50] = math.nan
    soundfile.write(folder / "nan.wav", nan, 8000, subtype="FLOAT")
    write_wave(folder / "slow.wav", [0.0] * 10, rate=10)
    write_wave(folder / "none.wav", [])
    yield "none.wav", None, "no samples"
    yield "nan.wav", None, "NaN"
    yield "slow.wav", None, "sample rate is 10 Hz"
    yield "empty.wav", b"", "Format not recognised"
    yield "text.wav", b"hello " * 100, "Format not recognised"
    yield "half.wav", whole[: len(whole) // 2], "cut short"
    yield "head.wav", whole[:44], "cut short"
    yield "half.flac", (folder / "whole.flac").read_bytes()[:2000], "lost sync"
    yield "half.mp3", (folder / "whole.mp3").read_bytes()[:1000], "cut short"


def test_what_is_wrong_with_a_file(tmp_path):
    for name, content, words in broken_files(tmp_path):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            read_audio(tmp_path / name, 8000, max_seconds=1)
        assert str(caught.value), name
        assert "\n" not in str(caught.value)


def test_a_streamed_wav_whose_header_does_not_know_the_length_is_read(tmp_path):
    whole = bytearray(write_wave(tmp_path / "a.wav", tone(8000)).read_bytes())
    whole[4:8] = whole[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(whole)
    assert len(read_audio(tmp_path / "a.wav", 8000, max_seconds=1)) == 4000


def test_without_soundfile_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match="pip install soundfile"):
        check_soundfile()
