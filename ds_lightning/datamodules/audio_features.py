"""Audio files: read as one channel at one rate, and turned into log-mel spectrograms."""

import math
import re
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ds_lightning.errors import ConfigError

_SLOWEST, _FASTEST = 1000, 768_000
# Power of a wave in [-1, 1]; below it is silence, and log(0) would be minus infinity.
_FLOOR = 1e-6
_SHORT_DATA = re.compile(r"^data : (\d+) \(should be \d+\)", re.MULTILINE)
# Sizes that programs write that stream a WAV file and can't know its length.
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)


def check_soundfile() -> None:
    """Refuse to go on where soundfile, or the library beneath it, is not installed.

    Raises:
        ConfigError: says what to install.
    """
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError) as error:
        raise ConfigError(f"audio needs the package soundfile ({error}); pip install soundfile") from error


def read_audio(path: str | Path, sample_rate: int, max_seconds: float) -> Tensor:
    """Read the start of an audio file as one channel (the mean of all) at another sample rate.

    Args:
        path: a file that libsndfile reads: WAV, FLAC, OGG, MP3 and others.
        sample_rate: of the result, in Hz.
        max_seconds: what comes later is not read.

    Returns:
        (samples,) float32, at least one, all finite; integer formats are scaled to [-1, 1].

    Raises:
        ValueError: no such format, no samples, a file that is cut short, samples that are not finite.

    Example:
        >>> read_audio("one.wav", 16000, max_seconds=1.0).shape  # doctest: +SKIP
        torch.Size([16000])
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate = int(file.samplerate)
            if not _SLOWEST <= rate <= _FASTEST:
                raise ValueError(f"its sample rate is {rate} Hz; expected {_SLOWEST} to {_FASTEST}")
            short = _SHORT_DATA.search(file.extra_info)
            # libsndfile reads what there is of a WAV file, and says so only here.
            if short is not None and int(short[1]) not in _UNKNOWN_SIZES:
                raise ValueError("it is cut short: its header promises more samples than it has")
            expected = min(int(file.frames), math.ceil(max_seconds * rate))
            samples = torch.from_numpy(file.read(expected, dtype="float32", always_2d=True))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(" ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")) from error
    if expected < 1:
        raise ValueError("it has no samples")
    if len(samples) < expected:
        raise ValueError(f"it is cut short: its header promises more than its {len(samples)} samples")
    if not bool(samples.isfinite().all()):
        raise ValueError("it has samples that are NaN or infinite")
    return resample(samples.mean(1), rate, sample_rate)


def resample(wave: Tensor, rate: int, sample_rate: int) -> Tensor:
    """Bring a wave from `rate` to `sample_rate`, both in Hz.

    Args:
        wave: (samples,) float.
        rate: of the wave.
        sample_rate: of the result.

    Returns:
        (about samples * sample_rate / rate,), at least one.
    """
    if rate == sample_rate:
        return wave
    from torchaudio.functional import resample as by_ratio

    # The filters of an odd ratio such as 44101 to 16000 would take gigabytes; this is off by less than 1e-5.
    ratio = Fraction(sample_rate, rate).limit_denominator(1000)
    changed: Tensor = by_ratio(wave, ratio.denominator, ratio.numerator)
    return changed


class LogMel:
    """Log-mel spectrogram: the natural logarithm of the power in bands, at least 1e-6.

    Args:
        sample_rate: of the waves, in Hz.
        mels: bands between 0 and half the sample rate, on the HTK scale.
        window_ms: length of the Hann window in milliseconds.
        hop_ms: time between frames in milliseconds.

    Example:
        >>> LogMel(sample_rate=16000, mels=40)(torch.zeros(16000)).shape
        torch.Size([40, 101])
    """

    def __init__(self, sample_rate: int, mels: int, window_ms: float = 25.0, hop_ms: float = 10.0) -> None:
        from torchaudio.functional import melscale_fbanks

        window = max(1, round(window_ms * sample_rate / 1000))
        self.hop = max(1, round(hop_ms * sample_rate / 1000))
        # The narrowest band is the lowest: it must be wider than a frequency bin, or it would be zero always.
        top = 2595 * math.log10(1 + sample_rate / 2 / 700)
        narrowest = 700 * (10 ** (2 * top / (mels + 1) / 2595) - 1)
        self.size = 1 << max(window - 1, math.ceil(sample_rate / narrowest)).bit_length()
        self._bands = melscale_fbanks(self.size // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate).T.contiguous()
        self._window = torch.hann_window(window)

    def __call__(self, wave: Tensor) -> Tensor:
        """Return (mels, 1 + samples // hop) float32 of a wave (samples,): frame t is centred on sample t * hop."""
        spectrum = torch.stft(
            wave,
            self.size,
            self.hop,
            win_length=len(self._window),
            window=self._window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        features: Tensor = (self._bands @ power).clamp_min(_FLOOR).log()
        return features
