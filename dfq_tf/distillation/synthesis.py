"""Batches of images in few steps, from a generator that has learnt to learn.

For each batch the generator starts anew, from weights that all batches train to be a
good start, and fits them and the batch's noise together (Fang et al. 2022, "Up to 100x
Faster Data-free Knowledge Distillation"). Five to ten steps make images for which a
generator without such a start takes hundreds.

Where many batches are made, the first layer is no part of that start: it is drawn anew,
as in the public implementation of Fang et al. It decides where things are in the
images. A start that keeps it gives all batches the same layout, more so from batch to
batch (docs/experiments/distillation.md).
"""

import functools
import math
from collections.abc import Callable, Sequence

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import losses, phases, steps
from dfq_tf.distillation.generator import AUGMENTATION, SYNTHESIS
from dfq_tf.distillation.pool import Store
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.settings import BudgetConfig
from dfq_tf.training import Learner, augment_pixels, optimizers

# Of Adam, as in the public implementation of Fang et al. 2022.
_BETAS = (0.5, 0.999)
# Share of past batches in the BN statistics that the batch at hand is to complete.
_PAST_SHARE = 0.9


class Synthesizer(tf.Module):
    """Makes one batch after the other: `begin`, some times `improve`, `keep`.

    The three are functions of (seed, step), int32 (2,), and of variables alone, so that
    they can be compiled; `makers` do all of it.

    Args:
      teacher: frozen; it says what images are like.
      generator: from noise to pixels, of the run's precision; its weights are the first
        start.
      students: the images are to fool them, once `adversarial_weight` is above 0.
      config: batch size, learning rates, weights of the losses.

    Attributes:
      generator: fits the batch at hand.
      adversarial_weight: scalar variable, 0 at first.
    """

    def __init__(
        self,
        teacher: ObservedTeacher,
        generator: keras.Model,
        students: Sequence[Learner],
        config: BudgetConfig,
    ) -> None:
        super().__init__(name="synthesizer")
        self._teacher, self._students, self._config = teacher, students, config
        self.generator = generator
        self.adversarial_weight = tf.Variable(0.0)
        size = config.batch_size
        self._first: list[tf.Variable] = []
        if config.draws_first_layer:
            self._first = generator.get_layer("dense").trainable_variables
        drawn = {id(v) for v in self._first}
        self._learning = [
            v for v in generator.trainable_variables if id(v) not in drawn
        ]
        self._weights = [*self._first, *self._learning]
        self._start = [tf.Variable(v) for v in self._learning]
        self._gradients = [tf.Variable(tf.zeros_like(v)) for v in self._start]
        self._latents = tf.Variable(tf.zeros((size, *generator.input_shape[1:])))
        # A GPU does not hold variables of int32.
        self._classes = tf.Variable(tf.zeros(size, tf.int64))
        # Means and variances, of all batches before this one, and of this one. Those
        # before the first one count as right: were they its own, which are far from
        # that, the next twenty batches would be made to outweigh them.
        moments = [*teacher.means, *teacher.variances]
        self._past = [tf.Variable(m) for m in moments]
        self._present = [tf.Variable(m) for m in moments]
        self._best = tf.Variable(tf.zeros((size, *teacher.image_shape), tf.uint8))
        self._best_loss = tf.Variable(0.0)
        self._seen = tf.Variable(tf.zeros_like(self._best))
        self._logits = tf.Variable(tf.zeros((size, teacher.num_classes)))
        rate = config.synthesis_learning_rate
        # The start moves once for each batch, as far as the generator in all its steps.
        self._start_optimizer = optimizers.steady_adam(
            self._start, rate * config.generator_steps, _BETAS
        )
        self._optimizers = [
            optimizers.steady_adam(self._weights, rate, _BETAS),
            optimizers.steady_adam(
                [self._latents], config.latent_learning_rate, _BETAS
            ),
        ]

    @property
    def all_variables(self) -> list[tf.Variable]:
        """Everything that making a batch changes, the optimizers' variables too."""
        made = [*self._optimizers, self._start_optimizer]
        return [*self.variables, *(v for each in made for v in each.variables())]

    def begin(self, seed_and_step: tf.Tensor) -> dict[str, tf.Tensor]:
        """Starts a batch: weights from the start; noise and wanted classes drawn.

        If the first layer is drawn, then as at first: Glorot and Bengio 2010's uniform
        kernel, and a bias of 0.
        """
        seeds = tf.random.split(tf.random.fold_in(seed_and_step, SYNTHESIS), 3)
        noise = tf.random.stateless_normal(self._latents.shape, seeds[0])
        count = self._teacher.num_classes
        shape = self._classes.shape
        classes = tf.random.stateless_uniform(shape, seeds[1], 0, count, tf.int32)
        self._latents.assign(noise)
        self._classes.assign(tf.cast(classes, tf.int64))
        if self._first:
            kernel, bias = self._first
            reach = math.sqrt(6 / sum(kernel.shape))
            drawn = tf.random.stateless_uniform(kernel.shape, seeds[2], -reach, reach)
            kernel.assign(drawn)
            bias.assign(tf.zeros_like(bias))
        for variable, start in zip(self._learning, self._start):
            variable.assign(start)
        states = [v for each in self._optimizers for v in each.variables()]
        for variable in [*states, *self._gradients]:
            variable.assign(tf.zeros_like(variable))
        self._best_loss.assign(float("inf"))
        return {}

    def improve(self, seed_and_step: tf.Tensor) -> dict[str, tf.Tensor]:
        """One step of the generator and the noise; the best images so far are kept.

        Returns:
          synthesis_loss, and its parts: bn_distance, class_loss, adversarial_loss.
        """
        config, weights = self._config, self._weights
        seed = tf.random.fold_in(seed_and_step, AUGMENTATION)
        mean = self._teacher.description.input_mean
        with tf.GradientTape() as tape:
            pixels = self.generator(self._latents, training=True)
            seen = augment_pixels(pixels, mean, config.student_augmentation, seed)
            logits, bn_inputs = self._teacher(seen)
            distance = self._bn_distance(bn_inputs)
            classes = tf.cast(self._classes, tf.int32)
            wrong = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits)
            )
            adversarial = self._adversarial_loss(seen, logits)
            loss = (
                config.bn_distance_weight * distance
                + config.class_weight * wrong
                + self.adversarial_weight * adversarial
            )
        gradients = tape.gradient(
            loss,
            [*weights, self._latents],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        self._seen.assign(tf.cast(tf.round(seen), tf.uint8))
        self._logits.assign(logits)
        images = tf.cast(tf.round(pixels), tf.uint8)
        self._best.assign(tf.where(loss < self._best_loss, images, self._best))
        self._best_loss.assign(tf.minimum(loss, self._best_loss))
        for total, gradient in zip(self._gradients, gradients[len(self._first) :]):
            total.assign_add(gradient)
        for_weights, for_latents = self._optimizers
        for_weights.apply_gradients(zip(gradients, weights))
        for_latents.apply_gradients([(gradients[-1], self._latents)])
        return {
            "synthesis_loss": loss,
            "bn_distance": distance,
            "class_loss": wrong,
            "adversarial_loss": adversarial,
        }

    def keep(self, seed_and_step: tf.Tensor) -> tf.Tensor:
        """Ends a batch: the start learns from all its steps (first-order MAML).

        Returns:
          The images of the least loss, uint8 (batch, height, width, channels).
        """
        del seed_and_step  # nothing is drawn
        self._start_optimizer.apply_gradients(zip(self._gradients, self._start))
        for past, mixed in zip(self._past, self._with_past(self._present)):
            past.assign(mixed)
        return tf.identity(self._best)

    def hand_over(self, answered: Store) -> dict[str, tf.Tensor]:
        """Adds what the teacher saw in the last step, rounded, and said."""
        answered.add(images=self._seen, logits=self._logits)
        return {}

    def makers(
        self, stores: Sequence[Store], seed: int, answered: Store | None = None
    ) -> list[Callable[..., steps.Measurements]]:
        """Compiles the making of batches.

        Args:
          stores: of images.
          seed: of the run.
          answered: for what the teacher sees and says, of `pool.answer_store`.

        Returns:
          For each store a function of a batch's number: it makes the batch, puts it
          there, and gives the last step's measurements. If `gives_answers`, which is
          False by default, `answered` takes those of the later half of the steps.
        """

        def keeping(store: Store) -> Callable[[tf.Tensor], None]:
            return lambda seed_and_step: store.add(images=self.keep(seed_and_step))

        begin, improve = phases.compiled(self.begin), phases.compiled(self.improve)
        num_steps = self._config.generator_steps
        hand_over = None
        if answered is not None:
            hand_over = phases.compiled(lambda seed_and_step: self.hand_over(answered))

        def make(
            keep: Callable[[tf.Tensor], None], number: int, gives_answers: bool = False
        ) -> steps.Measurements:
            batch = tf.constant([seed, number])
            begin(batch)
            measurements: steps.Measurements = {}
            for i in range(num_steps):
                step = tf.constant([seed, number * num_steps + i])
                measurements = improve(step)
                if hand_over and gives_answers and i >= num_steps // 2:
                    hand_over(step)
            keep(batch)
            return dict(measurements)

        return [
            functools.partial(make, phases.compiled(keeping(store))) for store in stores
        ]

    def _bn_distance(self, bn_inputs: Sequence[tf.Tensor]) -> tf.Tensor:
        """How far batches are, this one and those before it, from what BN remembers."""
        moments = [losses.channel_moments(values) for values in bn_inputs]
        present = [m for m, _ in moments] + [v for _, v in moments]
        for variable, value in zip(self._present, present):
            variable.assign(value)
        wanted = [*self._teacher.means, *self._teacher.variances]
        return losses.bn_distance(self._with_past(present), wanted)

    def _with_past(self, moments: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """A batch's moments, mixed with those of the batches before it."""
        return [
            _PAST_SHARE * past + (1 - _PAST_SHARE) * moment
            for past, moment in zip(self._past, moments)
        ]

    def _adversarial_loss(self, pixels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Less the KL divergence of the students, where they have the right class.

        Where a student is wrong already, more of it teaches nothing.
        """
        losses_of = [
            losses.agreeing_divergence(logits, learner.logits(pixels, training=False))
            for learner in self._students
        ]
        if not losses_of:
            return tf.constant(0.0)
        return -tf.add_n(losses_of) / len(losses_of)
