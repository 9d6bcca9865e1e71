from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.distillation import Source
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.importing import classifiers
from dfq_tf.quantization import student
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.reports import costs, inspection
from dfq_tf.settings import CalibrationConfig, DistillationConfig, RunConfig
from dfq_tf.tflite import proof
from dfq_tf.tflite.running import open_interpreter
from tests import helpers, networks

layers = keras.layers
FED = dict(input_mean=0, input_scale=1 / 255)


def sequential(*stack, shape=(8, 8, 3)):
    return keras.Sequential([layers.Input(shape, name="image"), *stack])


def became(model, **arguments):
    """Layer -> what becomes of it."""
    found = inspection.inspect(model, **{**FED, **arguments})
    return {row.name: row.becomes for row in found.rows}


def quantized(classifier):
    """The quantized network, its ranges from noise."""
    images = networks.images(classifier.image_shape, 4)
    return post_training(float_network(classifier), images)


def operators_in(content):
    """The names of a file's operators, in order of the alphabet."""
    interpreter = open_interpreter(content, delegates=False)
    return sorted(each["op_name"] for each in interpreter._get_ops_details())


def operators_of(rows):
    """The same of a table."""
    return sorted(
        name.strip().removeprefix("1x1 ")
        for row in rows
        for name in row.becomes.split(";")[0].split(",")
        if name.strip().removeprefix("1x1 ").replace("_", "").isupper()
        or name.strip().endswith("_2D")
    )


class RowsTest(parameterized.TestCase, tf.test.TestCase):
    def test_each_kind_of_row_of_keras_2(self):
        rows = became(
            sequential(
                layers.Conv2D(4, 3, name="conv"),
                layers.BatchNormalization(name="folded"),
                layers.ReLU(6.0, name="fused"),
                layers.BatchNormalization(name="alone"),
                layers.Activation("swish", name="swish"),
                layers.Dropout(0.5, name="dropout"),
                layers.DepthwiseConv2D(3, activation="relu", name="depthwise"),
                layers.MaxPooling2D(name="pool"),
                layers.SeparableConv2D(5, 1, name="separable"),
                layers.Flatten(name="flat"),
                layers.Dense(4, activation="softmax", name="dense"),
            )
        )
        self.assertEqual(
            rows,
            {
                "image": "QUANTIZE",
                "conv": "CONV_2D",
                "folded": "in conv",
                "fused": "in conv",
                "alone": "1x1 DEPTHWISE_CONV_2D",
                "swish": "LOGISTIC, MUL",
                "dropout": "dropped",
                "depthwise": "DEPTHWISE_CONV_2D",
                "pool": "MAX_POOL_2D",
                "separable": "1x1 DEPTHWISE_CONV_2D, CONV_2D",
                "flat": "RESHAPE",
                "dense": "FULLY_CONNECTED, SOFTMAX, QUANTIZE",
            },
        )

    def test_each_kind_of_row_of_keras_3(self):
        k3 = keras3()
        image = k3.Input((8, 8, 3), name="image")
        x = k3.layers.RandomFlip(name="flip")(image)
        x = k3.layers.Rescaling(1 / 255, name="rescaling")(x)
        x = k3.layers.Conv2D(4, 3, activation="silu", name="conv")(x)
        y = k3.layers.Conv2D(4, 1, use_bias=False, name="branch")(x)
        y = k3.layers.BatchNormalization(name="bn")(y)
        x = k3.layers.Add(name="add")([x, y])
        x = k3.layers.ReLU(name="relu")(x)
        x = k3.layers.GlobalAveragePooling2D(name="pool")(x)
        x = k3.layers.Dense(3, name="dense")(x)
        x = k3.layers.Softmax(name="softmax")(x)
        found = inspection.inspect(k3.Model(image, x))
        self.assertTrue(found.is_keras3)
        self.assertEqual(
            [(row.name, row.becomes) for row in found.rows],
            [
                ("image", "QUANTIZE"),
                ("flip", "dropped"),
                ("rescaling", "input quantization"),
                ("conv", "CONV_2D, LOGISTIC, MUL"),
                ("branch", "CONV_2D"),
                ("bn", "in branch"),
                ("add", "ADD"),
                ("relu", "in add"),
                ("pool", "MEAN"),
                ("dense", "FULLY_CONNECTED"),
                ("softmax", "SOFTMAX, QUANTIZE"),
            ],
        )
        conv = found.rows[3]
        self.assertEqual((conv.kind, conv.shape), ("Conv2D", (6, 6, 4)))
        self.assertEqual(conv.parameters, 4 * 27 + 4)
        self.assertAllClose(found.description.input_scale, [1 / 255])

    def test_order_of_channels_is_in_the_first_convolution(self):
        k3 = keras3()
        image = k3.Input((8, 8, 3), name="image")
        x = k3.applications.vgg16.preprocess_input(image)
        x = k3.layers.Conv2D(4, 8, name="conv")(x)
        x = k3.layers.Flatten(name="flat")(x)
        found = inspection.inspect(k3.Model(image, x))
        self.assertEqual(
            [row.becomes for row in found.rows],
            [
                "QUANTIZE, 1x1 DEPTHWISE_CONV_2D",
                *["in image"] * 5,  # three slices, their stack, the means
                "CONV_2D",
                "RESHAPE, QUANTIZE",
            ],
        )

    @parameterized.parameters(
        (0.0, "QUANTIZE", "input quantization"),
        (-1.0, "QUANTIZE, 1x1 DEPTHWISE_CONV_2D", "in image"),
    )
    def test_preprocessing_is_free_where_its_mean_is_a_pixel(self, offset, head, said):
        rows = became(
            sequential(
                layers.Rescaling(1 / 127.5, offset, name="rescaling"),
                layers.Conv2D(2, 8, name="conv"),
                layers.Flatten(name="flat"),
            ),
            input_mean=None,
            input_scale=None,
        )
        self.assertEqual((rows["image"], rows["rescaling"]), (head, said))

    def test_what_stands_in_a_model_inside_is_there_too(self):
        inner = keras.Sequential(
            [layers.Input((8, 8, 3)), layers.Conv2D(2, 8, name="inside")]
        )
        rows = became(sequential(inner, layers.Flatten(name="flat")))
        self.assertEqual(rows["inside"], "CONV_2D")

    @parameterized.parameters("mobilenet_like", "densenet_like", "bn_first")
    def test_operators_and_size_are_those_of_a_real_file(self, name):
        model = networks.learner(name).model
        found = inspection.inspect(model, input_mean=120, input_scale=1 / 64)
        teacher = networks.build(name)
        content = proof.convert(quantized(teacher))
        self.assertEqual(operators_of(found.rows), operators_in(content))
        self.assertAllClose(found.file_bytes, len(content), rtol=0.03)
        self.assertEmpty(found.problems)

    def test_operators_of_a_model_that_is_rebuilt(self):
        k3 = keras3()
        image = k3.Input((8, 8, 3))
        x = k3.layers.Rescaling(1 / 127.5, -1)(image)
        x = k3.layers.Conv2D(8, 3, activation="hard_silu")(x)
        x = k3.layers.Concatenate()([x, k3.layers.Activation("sigmoid")(x)])
        x = k3.layers.GlobalAveragePooling2D()(x)
        model = k3.Model(image, k3.layers.Dense(1, activation="sigmoid")(x))
        found = inspection.inspect(model)
        content = proof.convert(quantized(classifiers.as_classifier(model)))
        self.assertEqual(operators_of(found.rows), operators_in(content))
        self.assertAllClose(found.file_bytes, len(content), rtol=0.03)
        self.assertEqual((found.num_outputs, found.gives), (1, "sigmoid"))
        self.assertEqual(found.classifier.num_classes, 2)


class ProblemsTest(tf.test.TestCase):
    def test_all_are_found_at_once_and_the_others_are_told_too(self):
        conv = layers.Conv2D(4, 3, padding="same", activation="softsign", name="odd")
        found = inspection.inspect(
            sequential(
                layers.Conv2D(4, 3, padding="same", name="conv"),
                layers.BatchNormalization(name="bn"),
                conv,
                layers.BatchNormalization(axis=1, name="rows"),
                layers.Masking(name="masked"),
                layers.Reshape((64, 4), name="sequence"),
                layers.BatchNormalization(name="of_sequence"),
                layers.Dense(3, name="of_words"),
                layers.Flatten(name="flat"),
                layers.Dense(2, name="dense"),
            ),
            **FED,
        )
        rows = {row.name: row for row in found.rows}
        reasons = {row.name: row.problem for row in found.problems}
        self.assertSameElements(
            reasons, ["odd", "rows", "masked", "of_sequence", "of_words"]
        )
        self.assertEqual(reasons["odd"], "its activation is softsign")
        self.assertRegex(reasons["rows"], "has axis 1")
        self.assertRegex(reasons["of_sequence"], r"input of shape \(64, 4\)")
        self.assertEqual(
            rows["odd"].becomes, "NOT POSSIBLE: its activation is softsign"
        )
        self.assertEqual(rows["bn"].becomes, "in conv")
        self.assertEqual(rows["dense"].becomes, "FULLY_CONNECTED, QUANTIZE")
        self.assertIsNone(found.file_bytes)
        self.assertIsNone(found.classifier)
        self.assertEqual(found.num_batch_normalizations, 3)

    def test_layers_that_cannot_be_read_leave_the_others_readable(self):
        k3 = keras3()
        image = k3.Input((8, 8, 3), name="image")
        x = k3.layers.Conv2D(4, 3, name="conv")(image)
        x = k3.layers.BatchNormalization(name="bn")(x)
        x = k3.layers.Masking(name="masked")(x)
        x = k3.layers.Conv2D(4, 3, activation="softsign", name="odd")(x)
        x = k3.layers.BatchNormalization(name="behind")(x)
        x = k3.layers.GlobalAveragePooling2D(name="pool")(x)
        model = k3.Model(image, k3.layers.Dense(2, name="dense")(x))
        found = inspection.inspect(model)
        rows = {row.name: row for row in found.rows}
        self.assertEqual([row.name for row in found.problems], ["masked", "odd"])
        self.assertRegex(rows["masked"].problem, "of this class are not known")
        self.assertEqual(rows["odd"].problem, "its activation is softsign")
        self.assertEqual(rows["odd"].parameters, 4 * 36 + 4)
        self.assertEqual(rows["bn"].becomes, "in conv")
        self.assertEqual(rows["behind"].becomes, "1x1 DEPTHWISE_CONV_2D")
        self.assertIsNone(found.description)

    def test_layers_that_cannot_be_read_behind_images_of_any_size(self):
        k3 = keras3()
        image = k3.Input((None, None, 3), name="image")
        x = k3.layers.Conv2D(4, 3, name="conv")(image)
        x = k3.layers.UpSampling2D(interpolation="bicubic", name="up")(x)
        x = k3.layers.GlobalAveragePooling2D(name="pool")(x)
        found = inspection.inspect(k3.Model(image, x), image_size=(16, 16))
        self.assertEqual([row.name for row in found.problems], ["up"])
        self.assertEqual(found.rows[1].shape, (None, None, 4))
        self.assertEqual(found.image_shape, (16, 16, 3))

    def test_damaged_weights_are_a_problem_of_their_layer(self):
        model = sequential(layers.Conv2D(2, 8, name="conv"), layers.Flatten())
        model.get_layer("conv").bias.assign([np.nan, 0])
        (row,) = inspection.inspect(model, **FED).problems
        self.assertEqual(row.name, "conv")
        self.assertRegex(row.problem, "NaN or infinite weights")

    def test_lone_score_of_no_dense_layer(self):
        model = sequential(layers.Flatten(), layers.Dense(1, "softplus", name="f"))
        (row,) = inspection.inspect(model, **FED).problems
        self.assertEqual(row.name, "f")
        self.assertRegex(row.problem, "only a Dense layer can be made to give two")

    def test_lone_score_of_a_maximum_before_a_sigmoid(self):
        links = [layers.GlobalMaxPooling2D(), layers.Activation("sigmoid")]
        model = sequential(layers.Conv2D(1, 3), *links)
        found = inspection.inspect(model, **FED)
        self.assertEmpty(found.problems)
        self.assertEqual(found.classifier.num_classes, 2)

    def test_lone_score_that_may_be_anything(self):
        model = sequential(layers.Flatten(), layers.Dense(1))
        found = inspection.inspect(model, **FED)
        self.assertTrue(found.is_unclear)
        self.assertEqual(found.classifier.description.probabilities, None)
        self.assertFalse(inspection.inspect(model, **FED, output="logits").is_unclear)

    def test_quantized_student_is_refused(self):
        model = student.build(quantized(networks.build("vgg_like")))
        with self.assertRaisesRegex(ModelError, "quantized already"):
            inspection.inspect(model)

    def test_flags_that_do_not_fit_are_refused(self):
        model = sequential(layers.Conv2D(2, 8), layers.Flatten())
        with self.assertRaisesRegex(ConfigError, "input_mean has 2 values"):
            inspection.inspect(model, input_mean=(1, 2), input_scale=1)
        with self.assertRaisesRegex(ConfigError, "output is 'softmax'"):
            inspection.inspect(model, **FED, output="softmax")


class SumsTest(tf.test.TestCase):
    def test_multiply_accumulates_are_counted_by_hand(self):
        model = sequential(
            layers.Conv2D(4, 3, strides=2, padding="same"),  # 4x4 of 27, 4 times
            layers.DepthwiseConv2D(3),  # 2x2 of 9, 4 times
            layers.SeparableConv2D(5, 2),  # 1 of 4, 4 times; 1 of 4, 5 times
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(7),  # 5 of 7
        )
        found = inspection.inspect(model, **FED)
        by_hand = 16 * 27 * 4 + 4 * 9 * 4 + (4 * 4 + 4 * 5) + 5 * 7
        self.assertEqual(found.multiply_accumulates, by_hand)
        self.assertEqual(found.parameters, model.count_params())
        self.assertEqual(found.num_batch_normalizations, 1)

    def test_model_that_does_not_say_how_it_is_fed(self):
        model = sequential(layers.Conv2D(2, 8), layers.Flatten())
        found = inspection.inspect(model)
        self.assertIsNone(found.description)
        self.assertEmpty(found.problems)
        self.assertEqual(found.classifier.description.input_scale, (1.0,))
        self.assertEqual(found.gives, "logits")


def weights_of(classifier):
    nodes = classifier.graph.nodes.values()
    return [w.copy() for node in nodes for w in node.weights.values()]


class CostsTest(tf.test.TestCase):
    def test_measuring_counts_all_steps_and_leaves_the_teacher(self):
        model = sequential(
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3),
        )
        teacher = classifiers.as_classifier(model, **FED)
        weights = weights_of(teacher)
        config, run = DistillationConfig(noise_dim=8), RunConfig(precision="float32")
        with (
            mock.patch.object(costs, "_CONFIG", config),
            mock.patch.object(costs, "_RUN", run),
        ):
            cost = costs.measure(teacher)
        self.assertGreater(cost.df_q_seconds, 0)
        self.assertGreater(cost.df_qat_kd_seconds, cost.df_q_seconds)
        self.assertGreater(cost.memory_bytes, 50 * 2**20)
        self.assertEqual(cost.batch_size, 128)  # auto
        self.assertGreaterEqual(cost.cores, 1)
        self.assertTrue(helpers.all_equal(weights, weights_of(teacher)))

    def measured(self, before, timed, side=8):
        """What is found of a network by steps that took so long."""
        head, shape = [layers.Flatten(), layers.Dense(3)], (side, side, 3)
        model = sequential(*before, *head, shape=shape)
        teacher = classifiers.as_classifier(model, **FED)
        config = DistillationConfig(
            noise_dim=8,
            batch_size=64,
            warm_up_steps=10,
            warm_up_batch_size=48,
            rounds=7,
            student_steps=3,
            pool_batch_size=64,
        )
        calibration = CalibrationConfig(calibration_images=96)
        with (
            mock.patch.object(costs, "_CONFIG", config),
            mock.patch.object(costs, "_CALIBRATION", calibration),
            mock.patch.object(costs, "_timed", side_effect=timed) as timing,
            mock.patch.object(costs, "peak_bytes", return_value=1000),
        ):
            cost = costs.measure(teacher)
        self.assertEqual(timing.call_count, len(timed))
        small = timing.call_args_list[0].args[2].settings.batch_size
        self.assertEqual(small, 32)
        return cost

    # Student, warm-up: seconds to compile, of a step, bytes.
    TIMED = (costs._Timed(4.0, 0.125, 300), costs._Timed(1.0, 0.5, 200))

    def test_steps_are_multiplied(self):
        before = [layers.Conv2D(4, 3), layers.BatchNormalization()]
        cost = self.measured(before, self.TIMED)
        df_q = 1 + 0.5 * 10 * 48 / 32 + 0.5 * 96 / 32
        self.assertAlmostEqual(cost.df_q_seconds, df_q)
        rounds = 2 * 7 * 3 * 0.125
        self.assertAlmostEqual(cost.df_qat_kd_seconds, df_q + 4 + rounds)
        # The student's steps have 64 images, those of the warm-up 48.
        self.assertEqual(cost.memory_bytes, 1000 + (300 + 200) * 48 / 32)

    def test_where_other_images_calibrate_no_warm_up_counts(self):
        students, warm_up = self.TIMED
        normalized = [layers.Conv2D(4, 3, 4), layers.BatchNormalization()]
        for before, side, timed in (
            ([], 8, [students]),
            (normalized, 72, [students, warm_up]),  # unless photographs are near
        ):
            near = mock.Mock(return_value=Source("photographs", 0.1))
            with mock.patch.object(costs, "choose_source", near):
                cost = self.measured(before, timed, side)
            self.assertEqual(near.call_count, len(timed) - 1)
            calibration = 0.125 * 96 / 32
            self.assertAlmostEqual(cost.df_q_seconds, calibration)
            rounds = 2 * 7 * 3 * 0.125
            self.assertAlmostEqual(cost.df_qat_kd_seconds, calibration + 4 + rounds)
            self.assertEqual(cost.memory_bytes, 1000 + 2 * 300)

    def test_memory_of_a_batch(self):
        self.assertEqual(costs.memory_bytes(100.0, 16.0, 8, 128), 100 + 256)


if __name__ == "__main__":
    tf.test.main()
