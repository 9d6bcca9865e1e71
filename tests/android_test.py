"""The Android page: its bytes and its formula, through the runtime that phones have."""

import pathlib
import re

import numpy as np
from absl.testing import parameterized
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import tf
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, FileConfig
from dfq_tf.tflite.proof import convert
from dfq_tf.tflite.running import TFLiteClassifier
from tests import helpers, networks

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs/android.md"


def kotlin():
    """The page's class, and the lines for one channel."""
    blocks = re.findall(r"```kotlin\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (main,) = (block for block in blocks if "class ImageClassifier" in block)
    (gray,) = (block for block in blocks if "val red" in block)
    return main, gray


def argb(images):
    """What Bitmap.getPixels gives: (n, height * width) integers of 32 bits, signed."""
    red, green, blue = np.moveaxis(images.astype(np.int64), -1, 0)
    packed = (255 << 24) | (red << 16) | (green << 8) | blue
    return packed.astype(np.uint32).view(np.int32).reshape(len(images), -1)


def content_of(classifier, widths=BitWidths(), output_type="auto"):
    images = networks.images(classifier.image_shape, 64)
    network = post_training(float_network(classifier), images, widths)
    config = FileConfig("probabilities", output_type=output_type)
    return convert(network, images, config)


def run(content, buffer, dtype=np.int8):
    """The output for the bytes of one image, in the numbers that Kotlin has."""
    interpreter = litert.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (image,), (output,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    assert len(buffer) == np.prod(image["shape"])
    values = np.frombuffer(buffer, np.uint8).reshape(image["shape"])
    interpreter.set_tensor(image["index"], values)
    interpreter.invoke()
    raw = interpreter.get_tensor(output["index"]).tobytes()
    return np.frombuffer(raw, dtype)


class AndroidTest(parameterized.TestCase, tf.test.TestCase):
    def test_bytes_of_a_bitmap_give_the_class_and_its_probability(self):
        code, _ = kotlin()
        shifts = [int(s) for s in re.findall(r"put\(\(pixel shr (\d+)\)\.toByte", code)]
        self.assertLen(shifts, 3)
        self.assertIn("output[0].map { it.toInt() and 255 }", code)
        self.assertIn("scores[best] / 256f", code)
        classifier = helpers.small_classifier()
        content = content_of(classifier)
        images = networks.images(classifier.image_shape, 20, seed=3)
        expected = TFLiteClassifier(content).scores(images)
        self.assertGreater(len(set(expected.argmax(-1))), 1)
        for pixels, row in zip(argb(images), expected):
            parts = np.stack([pixels >> shift for shift in shifts], axis=-1)
            buffer = parts.astype(np.int8).tobytes()  # toByte keeps the low 8 bits
            scores = run(content, buffer).astype(np.int32) & 255
            best = int(scores.argmax())
            self.assertEqual(best, row.argmax())
            self.assertEqual(scores[best] / 256, row.max())

    def test_gray_bytes_are_pixels_of_one_channel(self):
        _, code = kotlin()
        weights = [int(w) for w in re.findall(r"(\d+) \* (?:red|green|blue)", code)]
        self.assertEqual(sum(weights), int(re.search(r"\) / (\d+)\)", code).group(1)))
        content = content_of(helpers.small_classifier((8, 8, 1)))
        gray = networks.images((8, 8, 1), 10, seed=3)
        expected = TFLiteClassifier(content).scores(gray).argmax(-1)
        for pixels, best in zip(argb(np.repeat(gray, 3, axis=-1)), expected):
            channels = [pixels >> 16 & 255, pixels >> 8 & 255, pixels & 255]
            summed = sum(w * c for w, c in zip(weights, channels))
            buffer = (summed // sum(weights)).astype(np.int8).tobytes()
            scores = run(content, buffer).astype(np.int32) & 255
            self.assertEqual(scores.argmax(), best)

    @parameterized.parameters(
        ("int8", "output[0].map { it.toInt() + 128 }", 128, 256),
        ("int16", "output[0].map { it.toInt() }", 0, 32768),
        ("float32", "output[0].toList()", 0, 1),
    )
    def test_lines_for_other_outputs_give_the_probability(
        self, kind, line, added, whole
    ):
        (row,) = re.findall(rf"(?m)^  \| `{kind}` \|.*$", PAGE.read_text())
        probability = "scores[best]" + (f" / {whole}f" if whole > 1 else "")
        self.assertEndsWith(row, f"| `{line}` | `{probability}` |")
        classifier = helpers.small_classifier()
        is_wide = kind == "int16"
        widths = BitWidths(num_bits_activation=16 if is_wide else 8)
        content = content_of(classifier, widths, "auto" if is_wide else kind)
        images = networks.images(classifier.image_shape, 5, seed=3)
        expected = TFLiteClassifier(content).scores(images)
        for image, of_image in zip(images, expected):
            values = run(content, image.tobytes(), np.dtype(kind))
            scores = values.astype(np.float64) + added
            best = int(scores.argmax())
            self.assertEqual(best, of_image.argmax())
            self.assertEqual(scores[best] / whole, of_image.max())

    def test_one_score_is_compared_with_a_half(self):
        said = re.search(
            r"scores\[0\] > (\d+)\).*?`> (\d+)`.*?`> ([\d.]+)f`",
            PAGE.read_text(),
            re.DOTALL,
        )
        self.assertEqual([*map(float, said.groups())], [256 / 2, 32768 / 2, 1 / 2])

    def test_names_of_the_page_are_those_of_a_run(self):
        text = PAGE.read_text()
        for name in ("df_qat_kd.tflite", "df_q.tflite", "labels.txt"):
            self.assertIn(name, text)


if __name__ == "__main__":
    tf.test.main()
