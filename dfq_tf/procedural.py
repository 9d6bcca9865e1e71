"""Images that a formula makes, which look like pictures to a network: 1/f noise.

The amplitudes in pictures of nature fall with the spatial frequency f, about as 1/f,
and their colour channels go together (Field 1987, "Relations between the statistics of
natural images and the response properties of cortical cells"). No picture is used.
"""

import numpy as np

# Drawn for each image: how fast amplitudes fall; the part of the colours in common;
# mean and standard deviation, in pixels.
_POWERS = (0.8, 1.6)
_COMMON = (0.3, 1.0)
_MEANS = (60.0, 190.0)
_CONTRASTS = (15.0, 80.0)
_TINT = 10.0  # standard deviation of the channels' means about the image's


def natural_noise(seed: int, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """1/f noise in colour.

    Args:
      seed: of the draws; the same seed gives the same images.
      count: number of images.
      shape: (height, width, channels), both sides above 1, of 1, 3 or 4 channels; the
        fourth is 255, as in photographs.

    Returns:
      uint8 (count, *shape).
    """
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.hypot(rows, columns)
    images = np.empty((count, *shape), np.uint8)
    for image in images:
        amplitude = np.zeros_like(frequency)
        power = -rng.uniform(*_POWERS)
        np.power(frequency, power, out=amplitude, where=frequency > 0)
        phases = rng.standard_normal((2, channels + 1, *frequency.shape))
        spectrum = amplitude * (phases[0] + 1j * phases[1])
        planes = np.fft.irfft2(spectrum, s=(height, width))
        planes /= planes.std(axis=(1, 2), keepdims=True)
        common = rng.uniform(*_COMMON)
        values = np.sqrt(common) * planes[-1] + np.sqrt(1 - common) * planes[:-1]
        mean = rng.uniform(*_MEANS) + _TINT * rng.standard_normal(channels)
        pixels = mean + rng.uniform(*_CONTRASTS) * np.moveaxis(values, 0, -1)
        image[...] = np.rint(np.clip(pixels, 0, 255))
    images[..., 3:] = 255  # opaque
    return images
