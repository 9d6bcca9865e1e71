import contextlib
import dataclasses
import functools
import json
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import budget, pool
from dfq_tf.distillation import generator as generators_module
from dfq_tf.distillation import plan as plans
from dfq_tf.distillation.generator import build_generator
from dfq_tf.distillation.teacher import observe
from dfq_tf.errors import ConfigError
from dfq_tf.procedural import natural_noise
from dfq_tf.settings import BudgetConfig
from dfq_tf.training import loop, muon
from dfq_tf.training.learner import Learner
from tests import helpers

SHAPE = (8, 8, 3)
CONFIG = BudgetConfig(
    batch_size=4,
    noise_dim=3,
    generator_steps=1,
    student_steps=3,
    answer_uses=2,
    first_share=0.4,
    bank_images=40,
    steps=5,  # 2 rounds of 3, after 1 without
)
PACE = plans.Pace(start=3.2, batch=2.0, answers=0.1, student=0.25)

_models = helpers.Reused(lambda seed: helpers.small_learner(SHAPE, seed=seed).model)


@contextlib.contextmanager
def small():
    """A small generator, few images of formulas, few answers, nothing compiled."""
    generator = functools.partial(build_generator, channels=8)
    with (
        mock.patch.object(generators_module, "build_generator", generator),
        mock.patch.multiple(pool, _OTHERS=4, _ANSWERED=2),
        mock.patch.object(budget, "_HELD_OUT_IMAGES", 8),
        helpers.eagerly(),
    ):
        yield


class BudgetTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        _models.begin()
        self.observed = observe(helpers.small_classifier(SHAPE))

    def made(self, directory=None, config=CONFIG, **changes):
        self.student = Learner(_models(5), helpers.description(4))
        context = helpers.context(config, directory=directory, **changes)
        return budget.Budget(self.observed, [self.student], context)

    @parameterized.parameters(("muon", muon.Muon), ("sgd", keras.optimizers.SGD))
    def test_students_are_moved_by_what_is_asked_for(self, name, kind):
        config = dataclasses.replace(
            CONFIG,
            student_optimizer=name,
            student_learning_rate=0.2,
            student_momentum=0.8,
        )
        with small():
            (optimizer,) = self.made(config=config)._training.student_optimizers
        self.assertIs(type(optimizer), kind)
        found = optimizer._learning_rate(0), optimizer.momentum
        self.assertAllClose(found, (0.2, 0.8))
        if name == "muon":
            rate = 0.2 * optimizer.kernel_share
            self.assertAllClose(rate, config.muon_learning_rate)

    def test_steps_are_counted_and_nothing_but_students_learns_by_them(self):
        with small():
            config = dataclasses.replace(CONFIG, generator_steps=2)
            made = self.made(helpers.new_folder(), config)
            calls = []
            for kind in ("_answer", "_student_step"):

                def watched(at, step=getattr(made, kind), kind=kind):
                    calls.append((kind, at.numpy()[1]))
                    return step(at)

                setattr(made, kind, watched)
            ((make, _),) = made._makers
            batches = []

            def making(number, gives_answers):
                batches.append(number)
                return make(number, gives_answers)

            made._makers = [(making, None)]
            teacher = helpers.copies(tf.nest.flatten(self.observed.weights))
            (synthesizer,) = made._training.synthesizers
            self.assertEqual(synthesizer.adversarial_weight, 0)
            held_out = made.held_out
            before = helpers.copies(self.student.model.trainable_variables)
            found = made.run()
        self.assertEqual(held_out.shape, (2 * 4, *SHAPE))
        self.assertAllEqual(made.held_out, held_out)
        answers = [number for kind, number in calls if kind == "_answer"]
        steps = [number for kind, number in calls if kind == "_student_step"]
        # Two at the beginning, two in each round; every one draws other numbers.
        self.assertEqual(answers, list(range(2 + 2 * 2)))
        # All are still there to be drawn, though there were two at first; and what the
        # teacher told the generator in the last of the two steps of the last round.
        self.assertLen(made._training.answers.store.all()["logits"], (6 + 1) * 4)
        self.assertEqual(steps, list(range(6)))
        # Behind the two batches held out.
        self.assertEqual(batches, [2, 3, 4])
        self.assertLen(made._training.bank.all()["images"], 3 * 4)
        now = tf.nest.flatten(self.observed.weights)
        self.assertTrue(helpers.all_equal(now, teacher))
        after = self.student.model.trainable_variables
        self.assertFalse(helpers.all_equal(after, before))
        self.assertContainsSubset({"synthesis_loss", "distillation_loss"}, found)
        self.assertAllClose(synthesizer.adversarial_weight, 1.1)
        # The learning rate ends at 0 with the last step.
        (optimizer,) = made._training.student_optimizers
        schedule = optimizer._learning_rate
        self.assertAllClose(schedule(6), 0.0, atol=1e-7)
        self.assertGreater(schedule(5), 1e-4)

    def test_last_batches_before_the_students_begin_are_held_out(self):
        """In place of the first ones, of a generator that had learnt nothing."""
        config = dataclasses.replace(CONFIG, first_share=0.7)  # 5 rounds, then 2
        with small():
            made = self.made(config=config)
            first, batches = made.held_out, []
            ((_, hold_out),) = made._makers
            (keep, _), *_ = made._makers

            def holding(number, gives_answers):
                self.assertFalse(gives_answers)
                found = hold_out(number)
                self.assertEqual(made._training.synthesizers[0].adversarial_weight, 0)
                batches.append(number)
                return found

            made._makers = [(keep, holding)]
            made.run()
        # Behind the two of the beginning: the last two of five.
        self.assertEqual(batches, [2 + 3, 2 + 4])
        self.assertEqual(made.held_out.shape, first.shape)
        self.assertNotAllEqual(made.held_out, first)
        bank = made._training.bank.all()["images"]
        self.assertLen(bank, (3 + 2) * 4)
        known = {image.tobytes() for image in bank}
        for image in made.held_out:
            self.assertNotIn(image.tobytes(), known)

    def test_formulas_do_not_give_the_images_that_judge_students(self):
        with small():
            others = self.made()._training.answers._others
        judging = natural_noise(0, 4, SHAPE)
        for image in others["noise"].numpy():
            self.assertFalse((image == judging).all((1, 2, 3)).any())

    @pytest.mark.long
    def test_images_held_out_are_not_in_the_bank(self):
        with small():
            made = self.made()
            made.run()
        bank = {image.tobytes() for image in made._training.bank.all()["images"]}
        for image in made.held_out:
            self.assertNotIn(image.tobytes(), bank)
        self.assertContainsSubset({i.tobytes() for i in made.sample(3)}, bank)

    def interrupt(self, made, at, save_seconds):
        """Runs until a round, once its number of rounds is decided; saves so often."""
        take = made._take

        def stopped(index, plan):
            if index == at:
                raise KeyboardInterrupt
            return take(index, plan)

        save = functools.partial(loop.run_loop, save_seconds=save_seconds)
        with (
            mock.patch.object(made, "_take", stopped),
            mock.patch.object(budget, "run_loop", save),
            self.assertRaises(KeyboardInterrupt),
        ):
            made.run()

    def taken(self, made):
        """Runs to the end, and returns the numbers of the rounds."""
        with mock.patch.object(made, "_round", wraps=made._round) as taken:
            made.run()
        return [call.args[0] for call in taken.call_args_list]

    def test_interrupted_run_goes_on_bit_by_bit(self):
        with small():
            whole = self.made(helpers.new_folder())
            whole.run()
            expected = helpers.copies(self.student.model.weights)
            folder = helpers.new_folder()
            interrupted = self.made(folder)
            self.interrupt(interrupted, 2, save_seconds=0)
            self.assertFalse(helpers.all_equal(self.student.model.weights, expected))
            held_out = interrupted.held_out
            again = self.made(folder)
            self.assertEmpty(again.held_out)  # they are not made again
            self.assertEqual(self.taken(again), [2])
            self.assertAllEqual(again.held_out, held_out)
            self.assertTrue(helpers.all_equal(self.student.model.weights, expected))

    def test_layers_that_draw_numbers_go_on_bit_by_bit(self):
        def made(folder):
            self.student = helpers.noisy_learner(SHAPE)
            context = helpers.context(CONFIG, directory=folder)
            return budget.Budget(self.observed, [self.student], context)

        with small():
            made(helpers.new_folder()).run()
            expected = helpers.copies(self.student.model.weights)
            folder = helpers.new_folder()
            self.interrupt(made(folder), 2, save_seconds=0)
            self.assertFalse(helpers.all_equal(self.student.model.weights, expected))
            made(folder).run()
        self.assertTrue(helpers.all_equal(self.student.model.weights, expected))

    def test_a_save_that_was_cut_off_is_no_checkpoint(self):
        """Its files are there, and no list that names them: the loop begins anew."""
        folder = helpers.new_folder()
        (folder / "checkpoints/distillation").mkdir(parents=True)
        (folder / "checkpoints/distillation/ckpt-1.index").touch()
        with small():
            made = self.made(folder)
            self.assertLen(made.held_out, 2 * 4)
            self.assertEqual(self.taken(made), [0, 1, 2])

    @pytest.mark.long
    def test_pace_is_measured_once_and_leaves_everything_as_it_was(self):
        config = dataclasses.replace(CONFIG, steps=0, minutes=1.0)
        folder = helpers.new_folder()
        values = []
        with small():
            take = budget.Budget._pace

            def watched(made):
                before = helpers.copies(made._training.all_variables)
                pace = take(made)
                after = made._training.all_variables
                values.append(helpers.all_equal(after, before))
                self.assertGreater(min(dataclasses.astuple(pace)), 0)
                return PACE

            with mock.patch.object(budget.Budget, "_pace", watched):
                made = [self.made(folder, config)._plan.first for _ in range(2)]
                longer = dataclasses.replace(config, minutes=2.0)
                other = self.made(helpers.new_folder(), longer)._plan.first
                self.assertGreater(other.rounds, made[0].rounds)
                # Checkpoints keep their plan, and another run is refused.
                kept = folder / "checkpoints/distillation"
                kept.mkdir(parents=True)
                (kept / "ckpt-1.index").touch()
                (kept / "checkpoint").write_text('model_checkpoint_path: "ckpt-1"')
                self.assertEqual(self.made(folder, longer)._plan.first, made[0])
                plan = folder / "distillation_plan.json"
                said = plan.read_text()
                plan.write_text('{"pace": {}}')
                with self.assertRaisesRegex(ConfigError, "_plan.json .*no rounds"):
                    self.made(folder, longer)
                plan.write_text(said)
        self.assertEqual(values, [True, True])
        self.assertEqual(*made)
        kept = json.loads((folder / "distillation_plan.json").read_text())
        self.assertEqual(kept["rounds"], made[0].rounds)
        self.assertEqual(kept["pace"], dataclasses.asdict(PACE))

    @contextlib.contextmanager
    def paced(self, seconds):
        """The plan rests on PACE; a clock on which each round takes so many seconds."""
        now = [100.0]
        take = budget.Budget._take

        def taken(*args):
            now[0] += seconds
            return take(*args)

        with (
            small(),
            mock.patch.object(budget.Budget, "_pace", lambda _: PACE),
            mock.patch.object(budget.Budget, "_take", taken),
            mock.patch.object(budget.time, "monotonic", lambda: now[0]),
        ):
            yield now

    # Of 30 s, 4 are for the images held out. By PACE, 8 rounds take 24 s, the first 3
    # without student steps. After 5 there are 30 - 10, or 30 - 25 s left.
    @parameterized.parameters(
        (2.0, {5: 15, 8: 15, 9: 15, 13: 15}, 15), (5.0, {5: 6}, 6)
    )
    def test_rounds_are_revised_by_the_time_that_they_take(self, each, found, rounds):
        config = dataclasses.replace(CONFIG, steps=0, minutes=0.5)
        folder = helpers.new_folder()
        with self.paced(each) as now:
            made = self.made(folder, config)
            self.assertEqual(made._plan.first, plans.Plan(8, 3, 3, 2))
            with mock.patch.object(
                budget, "run_loop", wraps=budget.run_loop
            ) as run_loop:
                made.run()
            self.assertEqual(now[0], 100 + rounds * each)
            left = run_loop.call_args.kwargs["seconds_left"]
            self.assertEqual(left(), 30 - rounds * each)
            made._training.seconds.assign(12.0)
            self.assertEqual(left(), 18)
        revised = json.loads((folder / "distillation_plan.json").read_text())["revised"]
        self.assertContainsSubset({str(k): v for k, v in found.items()}, revised)
        self.assertEqual(min(map(int, revised)), 5)
        (optimizer,) = made._training.student_optimizers
        self.assertEqual(optimizer.iterations, (rounds - 3) * 3)
        self.assertAllClose(
            optimizer._learning_rate(optimizer.iterations), 0, atol=1e-7
        )

    def test_the_least_minutes_that_are_named_suffice(self):
        """4 s for the images held out, 7.95 for a round, and 3 % of spare."""
        pace = dataclasses.replace(PACE, start=5.0)

        def planned(minutes):
            config = dataclasses.replace(CONFIG, steps=0, minutes=minutes)
            return self.made(config=config)._plan.first

        with self.paced(2.0), mock.patch.object(budget.Budget, "_pace", lambda _: pace):
            for minutes in (0.1, 0.2):
                with self.assertRaisesRegex(
                    ConfigError, r"needs at least 0\.3 for one"
                ):
                    planned(minutes)
            self.assertGreater(planned(0.3).total_student_steps, 0)

    def test_revised_run_goes_on_bit_by_bit(self):
        config = dataclasses.replace(CONFIG, steps=0, minutes=0.5)
        with self.paced(3.0):
            self.made(helpers.new_folder(), config).run()
            expected = helpers.copies(self.student.model.weights)
        folder = helpers.new_folder()
        with self.paced(3.0):
            # The last checkpoint is of the round before; what is revised is kept.
            self.interrupt(self.made(folder, config), 6, save_seconds=5)
            self.assertEqual(self.taken(self.made(folder, config))[0], 6)
        self.assertTrue(helpers.all_equal(self.student.model.weights, expected))

    def test_generators_take_turns(self):
        config = dataclasses.replace(CONFIG, num_generators=2, adversarial_weight=0.0)
        with small():
            made = self.made(config=config)
            starts = [helpers.copies(s._start) for s in made._training.synthesizers]
            for number, moved in ((2, [True, False]), (3, [True, True])):
                made._make_batch(number)
                now = [s._start for s in made._training.synthesizers]
                same = [helpers.all_equal(*pair) for pair in zip(now, starts)]
                self.assertEqual([not each for each in same], moved)

    @parameterized.parameters("crop", "crop_flip")
    def test_students_see_mirror_images_too_where_crops_are_mirrored(self, kind):
        config = dataclasses.replace(CONFIG, student_augmentation=kind)
        with small():
            made = self.made(config=config)
            made.run()
            stored = made._training.answers.store.all()
            with mock.patch.object(budget.steps, "descend_students") as descend:
                for number in range(8):
                    made._training.student_step(made._step(number))
        # The same image may be there twice, once as the generator had its answer.
        images: dict[bytes, list[np.ndarray]] = {}
        for row, answer in zip(stored["images"], stored["logits"]):
            images.setdefault(row.tobytes(), []).append(answer)
        mirrored = 0
        for call in descend.call_args_list:
            *_, pixels, logits = call.args
            for row, answer in zip(pixels.numpy().astype(np.uint8), logits.numpy()):
                # With the answer to an image that is stored.
                of_image, of_mirrored = (
                    [np.array_equal(answer, a) for a in images.get(key.tobytes(), [])]
                    for key in (row, row[:, ::-1])
                )
                is_mirrored = not any(of_image)
                self.assertTrue(any(of_image) or any(of_mirrored))
                mirrored += is_mirrored
        self.assertBetween(mirrored, *((0, 0) if kind == "crop" else (6, 26)))

    def test_several_devices_are_refused(self):
        strategy = mock.Mock(num_replicas_in_sync=2)
        with self.assertRaisesRegex(ConfigError, "^2 devices are to train, but the"):
            self.made(strategy=strategy)

    def test_images_of_formulas_are_those_with_a_share(self):
        config = dataclasses.replace(CONFIG, noise_share=0.0, photographs_share=0.2)
        found = budget._others(self.observed, helpers.context(config), 4)
        self.assertEqual(
            {k: v.shape for k, v in found.items()}, {"photographs": (4, *SHAPE)}
        )
        self.assertGreater(np.std(found["photographs"]), 10)

    def test_what_takes_time_before_the_first_round_is_shown(self):
        with small(), mock.patch.object(budget, "stage", wraps=budget.stage) as stage:
            self.made()
        shown = [call.args[0] for call in stage.call_args_list]
        self.assertEqual(shown, ["images of formulas", "images held out"])

    def test_steps_read_no_variable_that_a_gpu_does_not_hold(self):
        """Those of int32 are in the memory of the CPU, where XLA does not reach."""
        with small():
            training = self.made()._training
        found = [*training.variables, *training.all_variables]
        self.assertContainsSubset({tf.uint8, tf.int64}, {v.dtype for v in found})
        self.assertNotIn(tf.int32, {v.dtype for v in found})


if __name__ == "__main__":
    tf.test.main()
