import functools
import itertools
import os
import pathlib
import time
from concurrent import futures
from unittest import mock

import numpy as np
from absl.testing import parameterized
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError, ExportError, ModelError
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, FileConfig
from dfq_tf.tflite import running, writer
from tests import networks


@functools.cache
def file_of(name, widths=BitWidths()):
    classifier = networks.build(name)
    images = networks.images(classifier.image_shape, 64, seed=1)
    network = post_training(float_network(classifier), images, widths)
    return writer.write(network, FileConfig(favor="size"))


def details_of(content):
    interpreter = litert.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()
    (output,) = interpreter.get_output_details()
    return image, output


class TFLiteClassifierTest(tf.test.TestCase, parameterized.TestCase):
    def test_refuses_a_float_input(self):
        image = keras.layers.Input((4, 4, 1))
        scores = keras.layers.Dense(2)(keras.layers.Flatten()(image))
        model = keras.Model(image, scores)
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        with self.assertRaisesRegex(ExportError, "input is float32 .*must be uint8"):
            running.TFLiteClassifier(converter.convert())

    def test_a_file_is_read_by_its_path(self):
        content = file_of("padded_pooling")
        path = pathlib.Path(self.get_temp_dir()) / "model.tflite"
        path.write_bytes(content)
        images = networks.images(running.TFLiteClassifier(content).image_shape, 3)
        expected = running.TFLiteClassifier(content).scores(images)
        self.enter_context(mock.patch.dict(os.environ, HOME=str(path.parent)))
        for given in (path, str(path), "~/model.tflite"):
            tflite = running.TFLiteClassifier(given)
            self.assertAllEqual(tflite.scores(images), expected)
            self.assertEqual(
                tflite.interface(), running.TFLiteClassifier(content).interface()
            )

    @parameterized.parameters(
        ("nowhere.tflite", "^'nowhere.tflite' cannot be read: No such file .*; give "),
        (pathlib.Path("/"), "^'/' cannot be read: Is a directory; give the path"),
        (5, "^content is a builtins.int; give the bytes of a TFLite file, or its p"),
        (None, "^content is a builtins.NoneType; give the bytes"),
    )
    def test_what_is_no_file_is_refused(self, given, message):
        with self.assertRaisesRegex(ModelError, message):
            running.TFLiteClassifier(given)

    def test_latency_is_the_median_in_milliseconds(self):
        content = file_of("padded_pooling")
        tflite = running.TFLiteClassifier(content)
        self.assertGreater(tflite.latency(runs=5), 0.0)
        # A clock by which the runs take 1 to 10 ms, and the one before them 9 s.
        ticks = itertools.chain(
            [0.0, 9.0], *([i, i + (i + 1) / 1000] for i in range(10))
        )
        with mock.patch.object(running.time, "perf_counter", lambda: next(ticks)):
            self.assertAllClose(tflite.latency(runs=10), 5.5)
        self.assertRaises(StopIteration, lambda: next(ticks))

    def test_threads_that_share_it_get_the_scores_of_their_images(self):
        tflite = running.TFLiteClassifier(file_of("padded_pooling"))
        images = networks.images(tflite.image_shape, 2)
        expected = tflite.scores(images)
        self.assertNotAllEqual(*expected)
        invoke = tflite._interpreter.invoke

        def slowly():
            time.sleep(0.05)  # in which another thread could put its own image in
            invoke()

        with (
            mock.patch.object(tflite._interpreter, "invoke", slowly),
            futures.ThreadPoolExecutor(3) as pool,
        ):
            found = [pool.submit(tflite.scores, images[i : i + 1]) for i in (0, 1)]
            found.append(pool.submit(tflite.latency, 1))
        *scores, milliseconds = (each.result() for each in found)
        self.assertAllEqual(np.concatenate(scores), expected)
        self.assertGreater(milliseconds, 0)

    @parameterized.parameters(0, -1, 1.5, "3", None)
    def test_latency_of_no_runs_is_refused(self, runs):
        tflite = running.TFLiteClassifier(file_of("padded_pooling"))
        with self.assertRaisesRegex(
            ConfigError, f"^runs is {runs!r}; it must be an integer of at least 1$"
        ):
            tflite.latency(runs)

    @parameterized.parameters(0, -1, 1.5, "3", None, True)
    def test_no_threads_are_refused(self, num_threads):
        with self.assertRaisesRegex(
            ConfigError,
            f"^num_threads is {num_threads!r}; it must be an integer of at least 1$",
        ):
            running.TFLiteClassifier(file_of("padded_pooling"), num_threads)

    def test_numbers_of_numpy_are_numbers(self):
        tflite = running.TFLiteClassifier(file_of("padded_pooling"), np.int64(2))
        self.assertGreater(tflite.latency(np.int64(3)), 0.0)

    def test_one_piece_where_xnnpack_has_all_operators(self):
        pieces = [
            running.TFLiteClassifier(file_of("resnet_like", widths)).num_pieces
            for widths in (BitWidths(), BitWidths(4), BitWidths(8, 16))
        ]
        # Kernels of 4 bits break it up; nothing of 16 bits is taken over.
        self.assertEqual(pieces[0], 1)
        self.assertGreater(pieces[1], 1)
        self.assertEqual(pieces[2], 0)

    def test_scores_are_the_dequantized_integers(self):
        content = file_of("padded_pooling")
        tflite = running.TFLiteClassifier(content)
        self.assertEqual(tflite.image_shape, (8, 8, 1))
        self.assertEqual(tflite.num_classes, networks.NUM_CLASSES)
        images = networks.images(tflite.image_shape, 3)
        interpreter = litert.Interpreter(model_content=content)
        interpreter.allocate_tensors()
        image, output = details_of(content)
        scale, zero_point = output["quantization"]
        self.assertEqual(tflite.output_scale, scale)
        scores = tflite.scores(images)
        for pixels, row in zip(images, scores):
            interpreter.set_tensor(image["index"], pixels[None])
            interpreter.invoke()
            integers = interpreter.get_tensor(output["index"])[0].astype(int)
            self.assertAllClose(row, (integers - zero_point) * scale)

    @parameterized.parameters(
        ((8, 8, 1), np.uint8, r"array of shape \(8, 8, 1\); give at least one"),
        ((0, 8, 8, 1), np.uint8, "give at least one"),
        ((2, 8, 9, 1), np.uint8, r"are \(8, 9, 1\) each, .* = \(8, 8, 1\)"),
        ((2, 8, 8, 1), np.float32, "images are float32; .* uint8 pixels, 0 to 255"),
    )
    def test_other_images_are_refused(self, shape, dtype, message):
        tflite = running.TFLiteClassifier(file_of("padded_pooling"))
        with self.assertRaisesRegex(ModelError, message):
            tflite.scores(np.zeros(shape, dtype))

    def test_refuses_several_outputs(self):
        image = keras.layers.Input((8, 8, 1))
        flat = keras.layers.Flatten()(image)
        heads = [keras.layers.Dense(n)(flat) for n in (2, 3)]
        images = networks.images((8, 8, 1), 4).astype(np.float32)
        converter = tf.lite.TFLiteConverter.from_keras_model(keras.Model(image, heads))
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([i[None]] for i in images)
        converter.inference_input_type = tf.uint8
        with self.assertRaisesRegex(ExportError, "1 inputs and 2 outputs"):
            running.TFLiteClassifier(converter.convert())


class StoredTensorsTest(tf.test.TestCase):
    def test_are_what_an_interpreter_keeps(self):
        content = file_of("mobilenet_like", BitWidths(8, 16))  # no other kernels here
        images = networks.images((8, 8, 3), 3)
        stored = running.stored_tensors(content, images)
        interpreter = running.open_interpreter(content, keeps_tensors=True)
        (image,) = interpreter.get_input_details()
        details = {t["name"]: t for t in interpreter.get_tensor_details()}
        self.assertGreater(len(stored), 10)
        for i, pixels in enumerate(images):
            interpreter.set_tensor(image["index"], pixels[None])
            interpreter.invoke()
            for name, tensor in stored.items():
                kept = interpreter.get_tensor(details[name]["index"])
                self.assertAllEqual(tensor.integers[i], kept[0])
                scale, zero_point = details[name]["quantization"]
                values = (kept[0].astype(np.float32) - zero_point) * scale
                self.assertAllEqual(tensor.values[i], values)

    def test_last_of_them_is_what_the_file_gives(self):
        content = file_of("resnet_like")
        images = networks.images((8, 8, 3), 5)
        (*_, last) = running.stored_tensors(content, images).values()
        scores = running.TFLiteClassifier(content).scores(images)
        self.assertAllEqual(last.values, scores)


class KernelTypesTest(tf.test.TestCase):
    def test_names_nodes_and_types(self):
        types = running.kernel_types(file_of("vgg_like", BitWidths(4)))
        self.assertLen(types, 4)
        self.assertEqual(list(types.values()), ["int8", "int4", "int4", "int8"])


if __name__ == "__main__":
    tf.test.main()
