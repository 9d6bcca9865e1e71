import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.quantization.ranges import (
    Histogram,
    kernel_magnitudes,
    least_squares_range,
    percentile_range,
)


def histogram(values, bins=2048):
    counts, _ = np.histogram(values, bins, (values.min(), values.max()))
    return Histogram(float(values.min()), float(values.max()), counts)


def samples(kind, count=5987):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=count)
    return {
        "relu": lambda: np.maximum(normal, 0),
        "one_sided": lambda: rng.exponential(1, count),
        "negative": lambda: -rng.exponential(0.02, count),
        "above_zero": lambda: rng.uniform(3, 5, count),
        "below_zero": lambda: rng.uniform(-500, -300, count),
        "two_sided": lambda: 30 * normal + 10,
        "skewed": lambda: np.where(normal > 0, 4, 1) * normal,
        "uniform": lambda: rng.uniform(-1, 2, count),
        "outliers": lambda: np.append(normal, [9, -11]),
    }[kind]()


SAMPLES = (
    "relu",
    "one_sided",
    "negative",
    "above_zero",
    "below_zero",
    "two_sided",
    "skewed",
    "uniform",
    "outliers",
)


def squared_error(values, low, high, num_bits):
    """Mean over the values of what affine quantization in a range changes, squared."""
    scale = (high - low) / (2**num_bits - 1)
    zero_point = np.floor(-low / scale + 0.5)
    integers = np.floor(values / scale + 0.5) + zero_point
    integers = np.clip(integers, 0, 2**num_bits - 1)
    return np.mean(np.square(scale * (integers - zero_point) - values))


def least_squared_error(values, num_bits):
    """Over all ranges of fine steps that hold 0 and lie within the extremes."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    steps = 60 if low < 0 < high else 600
    shares = np.arange(1, steps + 1) / steps
    lows = low * shares if low < 0 else [0.0]
    highs = high * shares if high > 0 else [0.0]
    return min(squared_error(values, a, b, num_bits) for a in lows for b in highs)


class LeastSquaresRangeTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(kind=SAMPLES, num_bits=(2, 4, 6, 8))
    def test_no_range_errs_less_on_the_values_themselves(self, kind, num_bits):
        values = samples(kind)
        low, high = least_squares_range(histogram(values), num_bits)
        error = squared_error(values, low, high, num_bits)
        self.assertLess(error, 1.05 * least_squared_error(values, num_bits))
        self.assertBetween(low, min(values.min(), 0), 0)
        self.assertBetween(high, 0, max(values.max(), 0))

    @parameterized.product(kind=SAMPLES, num_bits=(2, 4, 8))
    def test_is_the_best_of_all_shares_of_the_extremes(self, kind, num_bits):
        # Bin by bin, where the code adds up all bins of an integer at once.
        bins = histogram(samples(kind))
        low, high = min(bins.low, 0), max(bins.high, 0)
        shares = np.linspace(1, 0.1, 31 if low < 0 < high else 91)
        values = np.repeat(bins.centers, bins.counts)
        candidates = [(a, b) for a in {*low * shares} for b in {*high * shares}]
        errors = [squared_error(values, *ends, num_bits) for ends in candidates]
        found = least_squares_range(bins, num_bits)
        self.assertAllClose(found, candidates[int(np.argmin(errors))], rtol=1e-12)

    @parameterized.parameters(*SAMPLES)
    def test_errs_less_than_the_extremes_at_few_bits(self, kind):
        values = samples(kind)
        extremes = min(values.min(), 0), max(values.max(), 0)
        found = least_squares_range(histogram(values), 3)
        self.assertLess(
            squared_error(values, *found, 3),
            0.95 * squared_error(values, *extremes, 3),
        )

    def test_one_value_far_out_is_cut_off_at_four_bits_and_hardly_at_eight(self):
        values = np.append(np.random.default_rng(0).normal(size=100_000), [12, -12])
        low, high = least_squares_range(histogram(values), 4)
        self.assertBetween(high, 2, 4)
        self.assertBetween(low, -4, -2)
        # An end at 6 costs (12 - 6)^2 once. That is more than the finer steps gain.
        values = values[:4000]
        values[:2] = 6, -6
        low, high = least_squares_range(histogram(values), 8)
        self.assertGreater(high, 5.5)
        self.assertLess(low, -5.5)
        low, high = least_squares_range(histogram(values), 4)
        self.assertLess(high, 4)
        self.assertGreater(low, -4)

    def test_ends_are_found_apart(self):
        # Many values up to 1 and a few of them down to -10.
        rng = np.random.default_rng(0)
        values = np.concatenate([rng.uniform(0, 1, 20_000), rng.uniform(-10, 0, 4)])
        low, high = least_squares_range(histogram(values), 3)
        self.assertBetween(low / values.min(), 0.1, 0.3)
        self.assertGreater(high, 0.9)

    def test_how_often_a_value_occurs_counts(self):
        counts = np.zeros(2048, int)
        counts[:1024], counts[-1] = 100, 1
        rare = Histogram(0.0, 8.0, counts)
        often = Histogram(0.0, 8.0, np.where(counts == 1, 100_000, counts))
        self.assertLess(least_squares_range(rare, 3)[1], 4.5)
        self.assertGreater(least_squares_range(often, 3)[1], 7.9)

    @parameterized.parameters(
        (0.7, (0.0, 0.7)), (-0.7, (-0.7, 0.0)), (1e-30, (0, 1e-30))
    )
    def test_a_constant_is_one_end(self, value, expected):
        # As `calibration.observe` counts it: all of it in one bin.
        counts = np.zeros(2048, int)
        counts[0] = 1000
        for num_bits in (4, 8):
            found = least_squares_range(Histogram(value, value, counts), num_bits)
            self.assertAllClose(found, expected, rtol=1e-6, atol=0)

    def test_zeros_have_a_range_of_nothing(self):
        counts = np.zeros(2048, int)
        counts[0] = 1000
        self.assertEqual(least_squares_range(Histogram(0.0, 0.0, counts), 4), (0, 0))

    def test_gives_plain_floats(self):
        for end in least_squares_range(histogram(samples("two_sided")), 4):
            self.assertIs(type(end), float)


class PercentileRangeTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(kind=SAMPLES, percentile=(60, 95, 99.9))
    def test_equals_the_percentiles_of_the_values(self, kind, percentile):
        values = samples(kind)
        low, high = percentile_range(histogram(values), percentile)
        expected = np.percentile(
            values, [100 - percentile, percentile], method="inverted_cdf"
        )
        # A value is known to half a bin.
        bin_width = np.ptp(values) / 2048
        self.assertAllClose(low, min(expected[0], 0), rtol=0, atol=0.51 * bin_width)
        self.assertAllClose(high, max(expected[1], 0), rtol=0, atol=0.51 * bin_width)

    @parameterized.parameters(*SAMPLES)
    def test_a_hundred_gives_the_extremes(self, kind):
        values = samples(kind)
        expected = min(values.min(), 0), max(values.max(), 0)
        self.assertEqual(percentile_range(histogram(values), 100), expected)

    def test_tails_are_left_out(self):
        values = np.append(np.linspace(-1, 1, 9998), [50, -70])
        low, high = percentile_range(histogram(values), 99.9)
        self.assertAllClose([low, high], [-1, 1], atol=0.05)
        # One value in 10 000 lies above 99.99 %; the one below it is near 1.
        low, high = percentile_range(histogram(values), 99.995)
        self.assertAllClose([low, high], [-70, 50], atol=0.05)

    @parameterized.parameters((0.7, (0, 0.7)), (-0.7, (-0.7, 0)), (0.0, (0, 0)))
    def test_a_constant_is_one_end(self, value, expected):
        counts = np.zeros(2048, int)
        counts[0] = 1000
        for percentile in (99, 100):
            found = percentile_range(Histogram(value, value, counts), percentile)
            self.assertAllClose(found, expected)


def kernels():
    """(3, 3, 8, 6), channels of all sizes: normal, uniform and with an outlier."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 8, 6))
    kernel[..., 2:4] = rng.uniform(-1, 1, (3, 3, 8, 2))
    kernel[1, 1, 1, 4:] = 9, -9
    return (kernel * [1, 100, 0.01, 3, 1, 0.3]).astype(np.float32)


def error_of(values, largest, num_bits):
    """Sum of what symmetric quantization changes, squared."""
    most = 2 ** (num_bits - 1) - 1
    integers = np.clip(np.floor(values * most / largest + 0.5), -most, most)
    return np.sum(np.square(integers * largest / most - values))


def least_error(values, num_bits):
    largest = np.abs(values).max()
    shares = np.arange(1, 1001) / 1000
    return min(error_of(values, share * largest, num_bits) for share in shares)


class KernelMagnitudesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(2, 4, 8)
    def test_min_max_is_the_largest_magnitude(self, num_bits):
        kernel = kernels()
        found = kernel_magnitudes(kernel, num_bits, per_channel=True, method="min_max")
        self.assertAllEqual(found, np.abs(kernel).max(axis=(0, 1, 2)))
        found = kernel_magnitudes(kernel, num_bits, per_channel=False, method="min_max")
        self.assertEqual(np.shape(found), ())
        self.assertEqual(found, np.abs(kernel).max())

    @parameterized.parameters(2, 3, 4, 6, 8)
    def test_mse_errs_no_more_than_any_other_range(self, num_bits):
        kernel = kernels().astype(np.float64)
        found = kernel_magnitudes(kernel, num_bits, per_channel=True, method="mse")
        self.assertEqual(found.shape, (6,))
        for channel, magnitude in enumerate(found):
            values = kernel[..., channel]
            largest = np.abs(values).max()
            error = error_of(values, magnitude, num_bits)
            self.assertLess(error, 1.03 * least_error(values, num_bits))
            self.assertLessEqual(error, error_of(values, largest, num_bits))
            self.assertLessEqual(magnitude, largest)

    @parameterized.parameters(2, 3, 4, 6, 8)
    def test_mse_of_all_channels_at_once(self, num_bits):
        kernel = kernels()[..., 2:].astype(np.float64)
        found = kernel_magnitudes(kernel, num_bits, per_channel=False, method="mse")
        self.assertEqual(np.shape(found), ())
        error = error_of(kernel, found, num_bits)
        self.assertLess(error, 1.03 * least_error(kernel, num_bits))
        self.assertLessEqual(error, error_of(kernel, np.abs(kernel).max(), num_bits))

    def test_mse_cuts_an_outlier_off_at_few_bits_only(self):
        kernel = kernels()
        largest = np.abs(kernel).max(axis=(0, 1, 2))
        few, many = (
            kernel_magnitudes(kernel, num_bits, per_channel=True, method="mse")
            for num_bits in (3, 8)
        )
        self.assertAllLess((few / largest)[4:], 0.6)
        self.assertAllGreater((many / largest)[4:], 0.95)

    @parameterized.product(per_channel=(True, False), method=("min_max", "mse"))
    def test_zeros_give_zero(self, per_channel, method):
        kernel = np.zeros((3, 3, 2, 4), np.float32)
        with np.errstate(all="raise"):
            found = kernel_magnitudes(kernel, 4, per_channel=per_channel, method=method)
        self.assertAllEqual(found, np.zeros(4) if per_channel else 0.0)

    @parameterized.parameters("min_max", "mse")
    def test_a_channel_of_zeros_leaves_the_others(self, method):
        kernel = kernels()
        expected = kernel_magnitudes(kernel, 4, per_channel=True, method=method)
        kernel[..., 3] = 0
        found = kernel_magnitudes(kernel, 4, per_channel=True, method=method)
        self.assertAllEqual(found, np.where(np.arange(6) == 3, 0, expected))
        self.assertAllGreater(np.delete(found, 3), 0)


if __name__ == "__main__":
    tf.test.main()
