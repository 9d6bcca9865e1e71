"""The Android page: its bytes and its formula, through the runtime that phones have."""

import pathlib
import re

import numpy as np
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import tf
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import FileConfig
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


def content_of(classifier):
    images = networks.images(classifier.image_shape, 64)
    network = post_training(float_network(classifier), images)
    return convert(network, images, FileConfig("probabilities"))


def run(content, buffer):
    """The output's bytes for the bytes of one image, as Kotlin has them."""
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
    return np.frombuffer(raw, np.int8)


class AndroidTest(tf.test.TestCase):
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

    def test_names_of_the_page_are_those_of_a_run(self):
        text = PAGE.read_text()
        for name in ("df_qat_kd.tflite", "df_q.tflite", "labels.txt"):
            self.assertIn(name, text)


if __name__ == "__main__":
    tf.test.main()
