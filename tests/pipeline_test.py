import functools
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf import data, evaluation, export, pipeline, training
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import BitWidths, DistillationConfig
from dfq_tf.description import ModelDescription
from dfq_tf.errors import ConfigError, UnsupportedLayerError

layers = keras.layers

CONFIG = DistillationConfig(
    batch_size=64,
    noise_dim=32,
    warm_up_steps=30,
    distillation_rounds=15,
    calibration_images=128,
)
# Enough to see whether something was done.
TINY = DistillationConfig(
    batch_size=16,
    noise_dim=8,
    warm_up_steps=3,
    distillation_rounds=3,
    calibration_images=32,
)


@functools.cache
def digits_teacher():
    """Two conv-BN-ReLU blocks, trained for seconds."""
    keras.utils.set_random_seed(0)
    image = x = layers.Input((8, 8, 1))
    for filters, strides in ((16, 1), (32, 2)):
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    names = tuple("0123456789")
    description = ModelDescription((120.0,), (1 / 64,), "logits", names)
    teacher = Classifier(keras.Model(image, x), description)
    train = data.open_dataset("digits").load("train")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    teacher.model.compile(keras.optimizers.Adam(0.01), loss)
    inputs = description.normalize(train.images.astype(np.float32))
    teacher.model.fit(inputs, train.labels, batch_size=64, epochs=6, verbose=0)
    return teacher


def quantize(teacher, **kwargs):
    settings = dict(config=CONFIG, precision="float32", show_progress=False)
    return pipeline.quantize(teacher, **{**settings, **kwargs})


class QuantizeTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.teacher = digits_teacher()
        cls.test = data.open_dataset("digits").load("test")
        cls.scores = cls.teacher.scores(cls.test.images)

    @parameterized.parameters("df_q", "df_qat_kd")
    def test_file_answers_as_the_teacher_which_stays_as_it_was(self, method):
        self.assertGreater(evaluation.accuracy(self.scores, self.test.labels), 0.9)
        before = self.teacher.model.get_weights()
        result = quantize(self.teacher, method=method)
        tflite = export.TFLiteClassifier(result.tflite)
        scores = tflite.scores(self.test.images)
        self.assertGreaterEqual(evaluation.agreement(self.scores, scores), 0.9)
        self.assertLessEqual(
            export.largest_difference(result.student, tflite, self.test.images), 3
        )
        export.check_integer_only(result.tflite)
        self.assertLen(self.teacher.model.get_weights(), len(before))
        for weight, value in zip(self.teacher.model.get_weights(), before):
            self.assertAllEqual(weight, value)
        images = training.generate(result.generator, CONFIG, 64, seed=3)
        self.assertEqual(images.shape, (64, 8, 8, 1))
        self.assertGreater(images.std(), 10)
        measured = {"distillation_loss", "agreement"} if method != "df_q" else set()
        self.assertContainsSubset(measured, result.measurements)
        self.assertEqual(bool(result.measurements), method == "df_qat_kd")

    def test_seed_decides_every_byte_and_a_finished_run_is_not_repeated(self):
        folder = self.get_temp_dir()
        first = quantize(self.teacher, config=TINY, seed=1, directory=folder)
        same = quantize(self.teacher, config=TINY, seed=1)
        other = quantize(self.teacher, config=TINY, seed=2)
        self.assertNotEqual(first.tflite, other.tflite)
        with self.assertNoTraining():
            again = quantize(self.teacher, config=TINY, seed=1, directory=folder)
        self.assertNotEmpty(first.measurements)
        self.assertEmpty(again.measurements)
        images = self.test.images[:50]
        for result in (same, again):
            self.assertAllEqual(
                result.student.scores(images), first.student.scores(images)
            )
            self.assertEqual(result.tflite, first.tflite)

    def assertNoTraining(self):
        def refuse(*args, **kwargs):
            raise AssertionError("a step was taken")

        names = ("warm_up_step", "generator_step", "student_step")
        return mock.patch.multiple(training.steps, **{name: refuse for name in names})

    @parameterized.parameters(
        (dict(method="magic"), r"method is 'magic'; it must be one of \['df_q'"),
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        (dict(precision="float8"), "precision is 'float8'; it must be one of"),
        (dict(widths=BitWidths(4, 8)), "num_bits_weight is 4 .*only 8 and 8"),
    )
    def test_bad_settings_are_named_before_any_work(self, settings, message):
        with self.assertNoTraining(), self.assertRaisesRegex(ConfigError, message):
            quantize(self.teacher, **settings)

    def test_unsupported_layer_is_named_before_any_work(self):
        image = layers.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, activation="tanh", name="odd")(image)
        x = layers.BatchNormalization()(x)
        model = keras.Model(image, layers.Dense(10)(layers.Flatten()(x)))
        teacher = Classifier(model, self.teacher.description)
        with (
            self.assertNoTraining(),
            self.assertRaisesRegex(UnsupportedLayerError, "layer odd .*tanh"),
        ):
            quantize(teacher)


class QuantizeWithDataTest(tf.test.TestCase):
    def test_ranges_are_those_of_the_images(self):
        teacher = digits_teacher()
        train = data.open_dataset("digits").load("train").images[:200]
        student = pipeline.quantize_with_data(teacher, train)
        test = data.open_dataset("digits").load("test").images
        agreement = evaluation.agreement(teacher.scores(test), student.scores(test))
        self.assertGreaterEqual(agreement, 0.95)
        relus = [la for la in teacher.model.layers if isinstance(la, layers.ReLU)]
        observed = keras.Model(teacher.model.input, [la.output for la in relus])
        inputs = teacher.description.normalize(train.astype(np.float32))
        for relu, output in zip(relus, observed.predict(inputs, verbose=0)):
            wrapper = student.model.get_layer(f"quant_{relu.name}")
            (high,) = (v for v in wrapper.weights if "output_max" in v.name)
            self.assertAllClose(high, output.max(), rtol=1e-4)


if __name__ == "__main__":
    tf.test.main()
