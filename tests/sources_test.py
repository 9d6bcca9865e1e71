from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf import photographs, procedural, settings
from dfq_tf.compat import tf
from dfq_tf.distillation import check_source, choose_source, observe, sources
from dfq_tf.distillation import teacher as teacher_module
from dfq_tf.errors import ConfigError
from dfq_tf.graph import Classifier, Graph
from dfq_tf.graph.layers import image, node
from tests import helpers

SHAPE = (8, 8, 3)


def teacher(mean=0.0, variance=1.0, epsilon=1e-3):
    """Pixels enter a BN layer with these statistics; their means are the scores."""
    first = image("image", SHAPE)
    values = {
        "gamma": np.ones(3),
        "beta": np.zeros(3),
        "mean": np.broadcast_to(mean, 3),
        "variance": np.broadcast_to(variance, 3),
    }
    norm = node("batch_normalization", "bn", [first], {"epsilon": epsilon}, values)
    pool = node("global_average_pool", "pool", [norm])
    graph = Graph([first, norm, pool], "pool")
    return Classifier(graph, helpers.description(3))


def fed(images):
    """What enters the BN layer."""
    return (images - 120.0) / 64


def crops(count=100, seed=5):
    return photographs.crops(seed, count, SHAPE)


def statistics(images):
    values = fed(images)
    return values.mean((0, 1, 2)), values.var((0, 1, 2))


class DistanceTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(None, 7)
    def test_is_the_divergence_of_two_normal_distributions(self, per_pass):
        mu, var, epsilon = np.array([0.5, -1, 0]), np.array([0.5, 2, 1]), 0.1
        observed = observe(teacher(mu, var, epsilon=epsilon))
        images = crops(20)
        m, v = statistics(images)
        v, var = v + epsilon, var + epsilon
        expected = ((m - mu) ** 2 + v) / (2 * var) - 0.5 - np.log(v / var) / 2
        with mock.patch.object(
            teacher_module,
            "images_per_pass",
            side_effect=lambda _, most: per_pass or most,
        ):
            found = teacher_module.distance_of(observed, images)
        self.assertAllClose(found, expected.mean(), rtol=1e-4)

    def test_the_farthest_layer_counts(self):
        learner = helpers.small_learner()
        observed = observe(helpers.classifier(learner.model))
        images = crops(12)
        _, inputs = observed(images.astype(np.float32))
        found = []
        for values, name in zip(inputs, ("bn1", "bn2")):
            bn, values = learner.model.get_layer(name), values.numpy()
            mu, var = bn.moving_mean.numpy(), bn.moving_variance.numpy() + bn.epsilon
            m, v = values.mean((0, 1, 2)), values.var((0, 1, 2)) + bn.epsilon
            each = ((m - mu) ** 2 + v) / (2 * var) - 0.5 - np.log(v / var) / 2
            found.append(each.mean())
        self.assertNotAllClose(found[0], found[1], rtol=0.1)
        self.assertAllClose(
            teacher_module.distance_of(observed, images), max(found), rtol=1e-4
        )

    def test_statistics_of_the_images_themselves_are_no_distance_away(self):
        images = crops()
        observed = observe(teacher(*statistics(images)))
        self.assertAllClose(teacher_module.distance_of(observed, images), 0, atol=1e-5)


class ChooseTest(tf.test.TestCase, parameterized.TestCase):
    def chosen(self, classifier, name="auto", small=63):
        with mock.patch.object(settings, "SMALL_IMAGE", small):
            return choose_source(observe(classifier), name, seed=0)

    def test_auto_takes_photographs_that_are_near(self):
        source = self.chosen(teacher(*statistics(crops())))
        self.assertEqual((source.name, source.kind), ("photographs", "photographs"))
        self.assertBetween(source.distance, 0, sources.NEAR)
        said = r"^Crops of the photographs .*, 0\.0\d nats from .* \(0\.2 is near\)$"
        self.assertRegex(str(source), said)

    def test_auto_takes_generated_images_where_photographs_are_far(self):
        mean, variance = statistics(crops())
        source = self.chosen(teacher(mean + 2 * np.sqrt(variance), variance))
        self.assertEqual((source.name, source.kind), ("generated", "generated"))
        self.assertAllClose(source.distance, 2, atol=0.5)  # 2^2 / 2
        self.assertRegex(str(source), r"^Generated images; photographs are [\d.]+ nats")

    def test_auto_takes_generated_images_where_they_cost_little(self):
        near = teacher(*statistics(crops()))
        for small, name in ((64, "generated"), (63, "photographs")):
            self.assertEqual(self.chosen(near, small=small).name, name)
        self.assertIsNone(self.chosen(near, small=64).distance)

    def test_auto_takes_procedural_images_where_nothing_is_remembered(self):
        first = image("image", SHAPE)
        graph = Graph([first, node("global_average_pool", "pool", [first])], "pool")
        plain = Classifier(graph, helpers.description(3))
        for small in (63, 64):
            source = self.chosen(plain, small=small)
            self.assertEqual((source.name, source.distance), ("procedural", None))
        for name in ("photographs", "generated"):
            source = self.chosen(plain, name)
            self.assertEqual((source.name, source.distance), (name, None))

    def test_what_is_asked_for_is_taken_however_far_it_is(self):
        far = teacher(9.0)
        for name in ("photographs", "procedural"):
            source = self.chosen(far, name)
            self.assertEqual(source.name, name)
            self.assertGreater(source.distance, sources.NEAR)
        self.assertIsNone(self.chosen(far, "generated").distance)

    def share(self, classifier, name="generated", most=0.5, distance=None):
        source = sources.Source(name, distance)
        return sources.photographs_share(observe(classifier), source, most, seed=0)

    def test_lessons_have_photographs_that_are_not_far(self):
        mean, variance = statistics(crops())
        self.assertEqual(self.share(teacher(mean, variance)), 0.5)
        self.assertEqual(self.share(teacher(mean, variance), most=0.25), 0.25)
        self.assertEqual(self.share(teacher(mean, variance), most=0.0), 0)
        # Photographs are nothing else, however few of them others may have.
        self.assertEqual(self.share(teacher(mean, variance), "photographs", 0.0), 1)
        # 2^2 / 2 and 1^2 / 2 nats away.
        far, less = (teacher(mean + k * np.sqrt(variance), variance) for k in (2, 1))
        self.assertEqual(self.share(far), 0)
        self.assertEqual(self.share(less), 0.5)
        # What was measured before is not measured again.
        self.assertEqual(self.share(far, distance=0.9), 0.5)
        self.assertEqual(self.share(less, distance=1.1), 0)

    def test_lessons_have_photographs_among_generated_images_alone(self):
        near = teacher(*statistics(crops()))
        for name in ("procedural", "some/folder"):
            self.assertEqual(self.share(near, name), 0)

    @parameterized.parameters((8, 0.5, [0, 2, 4, 6]), (8, 0.25, [0, 4]), (3, 0.3, [0]))
    def test_lessons_are_both_kinds_evenly_spread(self, count, share, places):
        numbers = np.arange(count, dtype=np.uint8)[:, None, None, None]
        images = np.zeros((count, *SHAPE), np.uint8) + numbers
        before = images.copy()
        lessons = sources.with_photographs(images, share, 5)
        others = sorted({*range(count)} - {*places})
        self.assertAllEqual(lessons[others], before[others])
        self.assertAllEqual(lessons[places], photographs.crops(5, len(places), SHAPE))
        self.assertAllEqual(images, before)
        self.assertIs(sources.with_photographs(images, 0.0, 5), images)

    def test_each_source_draws_its_images(self):
        folder = helpers.new_folder()
        red = np.zeros((9, 9, 3), np.uint8) + np.uint8([200, 0, 0])
        (folder / "red.png").write_bytes(tf.io.encode_png(red).numpy())
        for name, expected in (
            ("photographs", photographs.crops(4, 3, SHAPE)),
            ("procedural", procedural.natural_noise(4, 3, SHAPE)),
            (str(folder), photographs.crops(4, 3, SHAPE, folder)),
        ):
            self.assertAllEqual(sources.Source(name).draw(4, 3, SHAPE), expected)
        self.assertEqual(sources.Source(str(folder)).kind, "pictures")

    def test_what_cannot_be_had_is_refused(self):
        message = r"images is 'missing': .*'missing' is not there\. Name a fold"
        with self.assertRaisesRegex(ConfigError, message):
            check_source("missing")
        with self.assertRaisesRegex(ConfigError, message):
            self.chosen(teacher(), "missing")


if __name__ == "__main__":
    tf.test.main()
