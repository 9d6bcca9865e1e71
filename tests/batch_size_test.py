import dataclasses
import itertools
import math
import warnings
from unittest import mock

import pytest
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.distillation import batch_size
from dfq_tf.graph import running
from dfq_tf.settings import AUTO, BudgetConfig, DistillationConfig
from dfq_tf.training.learner import Learner, num_model_values
from tests import helpers

layers = keras.layers

# Of helpers.small_classifier: the image, two blocks of three layers, the mean, logits.
SMALL = 8 * 8 * 3 + 3 * 8 * 8 * 6 + 3 * 4 * 4 * 6 + 6 + 4
# Of the generator of its images: noise of one value; dense, reshaped, BN; two doublings
# of three layers each; the image, and its pixels.
GENERATOR = 1 + 3 * 2 * 2 * 128 + 3 * 4 * 4 * 128 + 3 * 8 * 8 * 64 + 2 * 8 * 8 * 3
# Bytes of a step where the student is the teacher, quantized.
EACH = 4 * GENERATOR + 3 * 3 * SMALL


def resolved(teacher, network=None, strategy=None, **settings):
    config = DistillationConfig(**settings)
    return batch_size.with_batch_size(config, teacher, network, strategy).batch_size


def network_of(name, shape, classes):
    return helpers.classifier(models.build_model(name, shape, classes))


def budget(size):
    return mock.patch.object(batch_size, "STEP_MEMORY", size)


class SizesTest(tf.test.TestCase, parameterized.TestCase):
    def test_outputs_of_all_layers_are_counted(self):
        self.assertEqual(num_model_values(helpers.small_learner().model), SMALL)
        self.assertEqual(running.num_values(helpers.small_classifier().graph), SMALL)

    def test_a_layer_counts_as_often_as_it_is_called(self):
        image = layers.Input((8, 8, 3))
        conv = layers.Conv2D(3, 1)
        inner = keras.Sequential([layers.Input((8, 8, 3)), layers.ReLU()])
        outputs = layers.Flatten()(inner(conv(conv(image))))
        model = keras.Model(image, outputs)
        graph = helpers.classifier(model).graph
        self.assertEqual(running.num_values(graph), 5 * 8 * 8 * 3)
        self.assertEqual(num_model_values(model), 5 * 8 * 8 * 3)


class StepTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(generators=(1, 3), students=(1, 2))
    def test_estimate_is_that_of_an_independent_count(self, generators, students):
        teacher = helpers.small_classifier()
        image = layers.Input((8, 8, 3))
        model = keras.Model(image, layers.Dense(4)(layers.Flatten()(image)))
        network = Learner(model, helpers.description(4))
        config = DistillationConfig(num_generators=generators, num_students=students)
        each = batch_size.step_bytes_per_image(teacher, network, config)
        as_graph = helpers.classifier(model)
        same = batch_size.step_bytes_per_image(teacher, as_graph, config)
        self.assertEqual(each, same)
        # Float32, and of teacher and students three quarters are kept, of the latter
        # of two of each output.
        student = 2 * (2 * 8 * 8 * 3 + 4)
        expected = generators * (4 * GENERATOR + 3 * (SMALL + students * student))
        self.assertEqual(each, expected)

    @parameterized.parameters(
        # Of the default, in which no generator learns behind the warm-up;
        (32, True, {}, 32, 4 * GENERATOR + 3 * SMALL),
        (32, False, {}, 32, 4 * GENERATOR + 3 * SMALL),
        (1, True, {}, 16, 3 * 2 * SMALL),
        (0, True, {}, 16, 3 * 2 * SMALL),
        # and where one does.
        (32, True, {"generator_steps": 1}, 64, EACH),
        (32, False, {"generator_steps": 1}, 32, 4 * GENERATOR + 3 * SMALL),
    )
    def test_largest_step_has_its_own_batch(self, warm_up, trains, steps, size, each):
        teacher = helpers.small_classifier()
        config = DistillationConfig(batch_size=64, **steps)
        network = teacher if trains else None
        found = batch_size.largest_step(teacher, network, config, warm_up, 16)
        self.assertEqual(found, (size, size * each))

    def test_a_network_counts_only_in_place_of_the_teacher(self):
        teacher = helpers.small_classifier()
        large = network_of("wrn_10_2", (8, 8, 3), 4)
        with budget(20 * EACH):
            self.assertEqual(resolved(teacher), 16)
            self.assertEqual(resolved(teacher, teacher), 16)
            self.assertLess(resolved(teacher, large), 16)

    @parameterized.parameters(
        (1.999, 2), (2, 2), (15.999, 8), (16, 16), (127.999, 64), (128, 128), (1e4, 128)
    )
    def test_is_the_largest_power_of_two_that_fits(self, images, expected):
        teacher = helpers.small_classifier()
        with budget(int(images * EACH)), warnings.catch_warnings():
            if images >= 2:
                warnings.simplefilter("error")
            else:
                warnings.simplefilter("ignore")
            self.assertEqual(resolved(teacher), expected)

    def test_a_step_that_does_not_fit_at_all_is_told(self):
        teacher = helpers.small_classifier()
        with (
            budget(1000),
            self.assertWarnsRegex(UserWarning, "takes about .* GiB .*, of 6 images"),
        ):
            strategy = mock.Mock(num_replicas_in_sync=3)
            resolved(teacher, strategy=strategy, num_generators=2)

    def test_generators_that_take_turns_need_no_larger_batch(self):
        teacher, config = helpers.small_classifier(), BudgetConfig(num_generators=5)
        with budget(2 * EACH):
            changed = batch_size.with_batch_size(config, teacher)
        self.assertEqual(changed.batch_size, 2)

    def test_a_number_is_kept(self):
        config = DistillationConfig(batch_size=37)
        teacher = helpers.small_classifier()
        with budget(1):
            self.assertIs(batch_size.with_batch_size(config, teacher), config)

    def test_nothing_else_changes(self):
        config = DistillationConfig(rounds=7, num_generators=3, alpha=2.0)
        teacher = helpers.small_classifier()
        changed = batch_size.with_batch_size(config, teacher)
        self.assertEqual(dataclasses.replace(changed, batch_size=AUTO), config)

    @parameterized.parameters(
        (2, 1, 100, 64), (3, 1, 1000, 126), (3, 2, 1000, 126), (3, 1, 100, 63)
    )
    def test_replicas_share_it_equally(self, replicas, generators, images, expected):
        teacher = helpers.small_classifier()
        strategy = mock.Mock(num_replicas_in_sync=replicas)
        each = generators * EACH
        with budget(images * each):
            size = resolved(teacher, strategy=strategy, num_generators=generators)
        self.assertEqual(size, expected)

    def test_falls_as_images_grow_and_obeys_the_budget(self):
        config = DistillationConfig()
        sizes = []
        for side in (8, 32, 64, 128):
            teacher = helpers.small_classifier((side, side, 3))
            each = batch_size.step_bytes_per_image(teacher, teacher, config)
            with budget(256 * 2**20):
                size = resolved(teacher)
            self.assertLessEqual(size * each, 256 * 2**20)
            if size < 128:
                self.assertGreater(2 * size * each, 256 * 2**20)
            self.assertEqual(size, 2 ** round(math.log2(size)))
            sizes.append(size)
        self.assertEqual(sizes[0], 128)
        self.assertLess(sizes[-1], 128)
        for one, next_one in itertools.pairwise(sizes):
            self.assertGreaterEqual(one, next_one)

    @pytest.mark.long
    def test_32_pixels_have_the_batch_that_results_are_published_for(self):
        self.check_batch_at_32_pixels("wrn_40_2")

    @pytest.mark.long
    def test_so_they_have_in_a_mobilenet(self):
        self.check_batch_at_32_pixels("mobilenet_v1_100")

    def check_batch_at_32_pixels(self, name):
        teacher = network_of(name, (32, 32, 3), 10)
        self.assertEqual(resolved(teacher), 128)

    def test_mobilenet_v1_at_224_pixels_has_a_smaller_one(self):
        teacher = network_of("mobilenet_v1_100", (224, 224, 3), 10)
        size = resolved(teacher)
        self.assertBetween(size, 8, 64)
        config = DistillationConfig(batch_size=size)
        each = batch_size.step_bytes_per_image(teacher, teacher, config)
        self.assertLessEqual(size * each, 4 * 2**30)


if __name__ == "__main__":
    tf.test.main()
