"""What a user may bring that cannot be quantized: one clear message each.

Each case makes a file, gives it to `tools/run.py` with flags that would do for a sound
one, and tells the exit code and what the message must say.
"""

import io
import json
import struct
import zipfile

import h5py
import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from tests.helpers import new_folder
from tests.tool_runner import run_in_process

K = keras3()
L, ops = K.layers, K.ops
L2 = keras.layers

FED = ("--input_mean=0", "--input_scale=1/255")


def network(*links, library=K, shape=(8, 8, 3), units=4, head="softmax"):
    """A model of the links and a dense layer."""
    image = x = library.layers.Input(shape)
    for link in links:
        x = link(x)
    if len(x.shape) == 4:
        x = library.layers.GlobalAveragePooling2D()(x)
    return library.Model(image, library.layers.Dense(units, head, name="last")(x))


def saved(*links, name="model.keras", **settings):
    """A case's model, made when the case runs."""

    def make(folder):
        network(*[link() for link in links], **settings).save(folder / name)
        return folder / name

    return make


def built(function, name="model.keras"):
    def make(folder):
        function().save(folder / name)
        return folder / name

    return make


def written(content, name="model.keras"):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def truncated(name):
    def make(folder):
        path = saved(name=name, library=keras)(folder)
        path.write_bytes(path.read_bytes()[:-2000])
        return path

    return make


def changed_archive(change):
    """A sound archive whose members, name -> content, are changed."""

    def make(folder):
        path = saved(lambda: L.Conv2D(4, 3, name="conv"))(folder)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        items = change(members) or members.items()
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in items:
                archive.writestr(name, content)
        return path

    return make


def changed_config(change):
    """An archive whose second layer's configuration is changed."""

    def change_members(members):
        config = json.loads(members["config.json"])
        change(config["config"]["layers"][1])
        members["config.json"] = json.dumps(config)

    return changed_archive(change_members)


def claims_to_unpack_to_more(folder):
    path = saved()(folder)
    content = bytearray(path.read_bytes())
    place = -1
    while (place := content.find(b"PK\x01\x02", place + 1)) >= 0:
        content[place + 24 : place + 28] = struct.pack("<I", 0xF0000000)
    path.write_bytes(content)
    return path


def linked_weights(members):
    weights = io.BytesIO(members["model.weights.h5"])
    with h5py.File(weights, "a") as file:
        file["stolen"] = h5py.ExternalLink("/etc/passwd", "/")
    members["model.weights.h5"] = weights.getvalue()


def weights_outside(folder):
    path = saved(library=keras, name="model.h5")(folder)
    with h5py.File(path, "a") as file:
        file.create_dataset("out", (4,), "i1", external=[("other.bin", 0, 4)])
    return path


def weights_only(folder):
    network(library=keras).save_weights(folder / "model.h5")
    return folder / "model.h5"


def saved_model(folder):
    tf.saved_model.save(tf.Module(), str(folder / "saved"))
    return folder / "saved"


def with_text(name, content):
    """A sound model and a text file beside it."""

    def make(folder):
        (folder / name).write_text(content)
        return saved()(folder)

    return make


def two_inputs():
    images = [L.Input((8, 8, 3)) for _ in range(2)]
    x = L.GlobalAveragePooling2D()(L.Add()(images))
    return K.Model(images, L.Dense(4)(x))


def two_outputs():
    image = L.Input((8, 8, 3))
    x = L.GlobalAveragePooling2D()(image)
    return K.Model(image, [L.Dense(4, name="four")(x), L.Dense(2, name="two")(x)])


def nan_weights():
    model = network(lambda x: L.Conv2D(4, 3, name="conv")(x))
    layer = model.get_layer("conv")
    layer.set_weights([np.full_like(w, np.nan) for w in layer.get_weights()])
    return model


def plain(*layers):
    return lambda: K.Sequential([L.Input((8, 8, 3)), *layers])


def functional_of_functions(layer):
    layer.update(
        module="tf_keras.src.layers.core.tf_op_layer",
        class_name="TFOpLambda",
        registered_name="TFOpLambda",
        config={"name": "write", "function": "io.write_file"},
    )


CASES = {
    # Files that are no models.
    "absent": (lambda folder: folder / "no.keras", FED, 1, "no model file .*no.keras"),
    "other_format": (written(b"", "model.onnx"), FED, 1, "must end in .keras, .h5"),
    "tflite": (written(b"TFL3", "model.tflite"), FED, 1, "must end in .keras, .h5"),
    "saved_model": (saved_model, FED, 1, "is a SavedModel: .*model.save"),
    "folder": (lambda folder: folder, FED, 1, "is a folder; name a model file"),
    "empty": (written(b""), FED, 1, "truncated, or of another format"),
    "text": (written(b"no model at all"), FED, 1, "truncated, or of another format"),
    "truncated_archive": (truncated("model.keras"), FED, 1, "truncated or damaged"),
    "truncated_hdf5": (truncated("model.h5"), FED, 1, "truncated or damaged"),
    "archive_of_something_else": (
        changed_archive(lambda members: [("a.txt", "hello")]),
        FED,
        1,
        "has no config.json, metadata.json, model.weights.h5: it is no Keras model",
    ),
    "archive_without_weights": (
        changed_archive(lambda members: members.pop("model.weights.h5") and None),
        FED,
        1,
        "has no model.weights.h5",
    ),
    "weights_that_are_none": (
        changed_archive(lambda members: members.update({"model.weights.h5": b"no"})),
        FED,
        1,
        "truncated or damaged. The reader said",
    ),
    "config_that_is_no_json": (
        changed_archive(lambda members: members.update({"config.json": "{"})),
        FED,
        1,
        "truncated or damaged. The reader said",
    ),
    "config_that_is_a_list": (
        changed_archive(lambda members: members.update({"config.json": "[]"})),
        FED,
        1,
        "no configuration of a model",
    ),
    "config_that_is_too_deep": (
        changed_archive(
            lambda members: members.update({"config.json": "[" * 10**5 + "]" * 10**5})
        ),
        FED,
        1,
        "truncated or damaged. The reader said",
    ),
    "config_of_an_unknown_setting": (
        changed_config(lambda layer: layer["config"].update(filters="many")),
        FED,
        1,
        "truncated or damaged. The reader said",
    ),
    "weights_without_a_model": (weights_only, FED, 1, "weights without a model; build"),
    "description_that_is_no_json": (
        with_text("model.json", "{"),
        (),
        1,
        "model.json is not a model description",
    ),
    # Files that are not to be trusted.
    "member_outside": (
        changed_archive(lambda members: members.update({"../evil.py": "1"})),
        FED,
        1,
        r"'../evil.py' outside its own folder; do not trust",
    ),
    "member_of_the_root": (
        changed_archive(lambda members: members.update({"/etc/evil": "1"})),
        FED,
        1,
        r"'/etc/evil' outside its own folder",
    ),
    "member_twice": (
        changed_archive(lambda members: [*members.items(), *members.items()]),
        FED,
        1,
        "two members of one name",
    ),
    "archive_that_fills_the_disk": (
        claims_to_unpack_to_more,
        FED,
        1,
        "unpacks to more than 4 GiB",
    ),
    "weights_of_another_file": (
        changed_archive(linked_weights),
        FED,
        1,
        "takes 'stolen' from another file; do not trust",
    ),
    "weights_stored_outside": (weights_outside, FED, 1, "takes 'out' from another"),
    "lambda": (
        saved(lambda: L.Lambda(lambda x: x / 2, name="half")),
        FED,
        1,
        r"holds Python code \(half, a Lambda layer\).*--allow_code",
    ),
    "lambda_of_keras_2": (
        saved(lambda: L2.Lambda(lambda x: x / 2, name="half"), library=keras),
        FED,
        1,
        r"holds Python code \(half, a Lambda layer\).*--allow_code",
    ),
    "lambda_in_hdf5": (
        saved(
            lambda: L2.Lambda(lambda x: x / 2, name="half"),
            library=keras,
            name="model.h5",
        ),
        FED,
        1,
        r"holds Python code \(half, a Lambda layer\).*--allow_code",
    ),
    "lambda_in_a_setting": (
        changed_config(
            lambda layer: layer["config"].update(
                activation={"class_name": "__lambda__", "config": {"value": "ab"}}
            )
        ),
        FED,
        1,
        r"holds Python code \(__lambda__, a lambda\).*Write it as Keras layers$",
    ),
    "activation_that_is_installed": (
        changed_config(
            lambda layer: layer["config"].update(
                activation={"module": "numpy.own", "class_name": "mine"}
            )
        ),
        FED,
        1,
        "names numpy.own.mine, .* Write it as Keras layers$",
    ),
    "activation_that_is_not_installed": (
        changed_config(
            lambda layer: layer["config"].update(
                activation={"module": "absent.own", "class_name": "mine"}
            )
        ),
        FED,
        1,
        "names absent.own.mine, .* Write it as Keras layers$",
    ),
    "function_of_the_system": (
        changed_config(
            lambda layer: layer.update(
                module="os", class_name="system", registered_name=None
            )
        ),
        FED,
        1,
        "names os.system .*which is not known here, and loading would import",
    ),
    "function_of_keras": (
        changed_config(
            lambda layer: layer.update(module="keras.utils", class_name="get_file")
        ),
        FED,
        1,
        "names keras.utils.get_file",
    ),
    "registered_class": (
        changed_config(
            lambda layer: layer.update(
                module=None, class_name="Magic", registered_name="own>Magic"
            )
        ),
        FED,
        1,
        r"names Magic \(layer conv\).*Write it as Keras layers$",
    ),
    "layer_that_reads_a_saved_model": (
        changed_config(lambda layer: layer.update(class_name="TFSMLayer")),
        FED,
        1,
        "names keras.layers.TFSMLayer",
    ),
    "layer_that_unpickles": (
        changed_config(lambda layer: layer.update(class_name="TorchModuleWrapper")),
        FED,
        1,
        "names keras.layers.TorchModuleWrapper",
    ),
    "function_of_tensorflow": (
        changed_config(functional_of_functions),
        FED,
        1,
        "names tf_keras.src.layers.core.tf_op_layer.TFOpLambda",
    ),
    # Models that are no image classifiers.
    "two_inputs": (built(two_inputs), FED, 1, "has 2 inputs and 1 outputs"),
    "two_outputs": (
        built(two_outputs),
        FED,
        2,
        r"has 2 outputs: four \(None, 4\), two \(None, 2\); .*--head=four",
    ),
    "no_such_output": (
        built(two_outputs),
        (*FED, "--head=three"),
        2,
        r"head is 'three', but the model has 2 outputs: four \(None, 4\), two ",
    ),
    "one_output_of_another_name": (
        saved(),
        (*FED, "--head=three"),
        2,
        r"head is 'three', but the model has one output, last \(None, 4\); leave",
    ),
    "vectors": (
        built(lambda: K.Sequential([L.Input((784,)), L.Dense(10)])),
        FED,
        1,
        r"input shape is \(None, 784\)",
    ),
    "segmentation": (
        built(plain(L.Conv2D(4, 3))),
        FED,
        1,
        r"output shape is \(None, 6, 6, 4\)",
    ),
    "any_size": (
        saved(shape=(None, None, 3)),
        FED,
        2,
        "images of any size.*--image_size=HEIGHT,WIDTH",
    ),
    "too_small": (saved(shape=(4, 8, 3)), FED, 1, "4 x 8 pixels; both sides must be 8"),
    "too_large": (saved(shape=(8, 641, 3)), FED, 1, "8 x 641 pixels"),
    "two_channels": (saved(shape=(8, 8, 2)), FED, 1, "2 channels; they must have"),
    # Layers without an integer form.
    "unknown_layer": (
        saved(lambda: L.Masking(name="masked")),
        FED,
        1,
        r"layer masked \(Masking\) cannot be quantized",
    ),
    "unknown_activation": (
        saved(lambda: L.Conv2D(4, 3, activation="softsign", name="conv")),
        FED,
        1,
        r"layer conv \(Conv2D\) cannot be quantized: its activation is softsign",
    ),
    "softmax_inside": (
        saved(lambda: L.Softmax(name="attention")),
        FED,
        1,
        r"layer attention \(softmax\) cannot be quantized",
    ),
    "batch_normalization_of_rows": (
        saved(lambda: L.BatchNormalization(axis=1, name="bn")),
        FED,
        1,
        r"layer bn \(BatchNormalization\) cannot be quantized: it has axis 1",
    ),
    "channels_first": (
        saved(lambda: L.MaxPooling2D(data_format="channels_first", name="pool")),
        FED,
        1,
        r"layer pool \(MaxPooling2D\) cannot be quantized: .*channels_first",
    ),
    "resizing": (
        saved(lambda: L.Resizing(16, 16, name="resize")),
        FED,
        1,
        r"layer resize \(Resizing\) cannot be quantized: it makes images of \(16, 16",
    ),
    "normalization_of_places": (
        saved(
            lambda: L.Normalization(
                axis=(1, 2, 3),
                mean=np.zeros((8, 8, 3)),
                variance=np.ones((8, 8, 3)),
                name="norm",
            )
        ),
        FED,
        1,
        r"layer norm \(Normalization\) cannot be quantized: it has axis",
    ),
    "rescaling_of_places": (
        saved(lambda: L.Rescaling(np.ones((8, 3)).tolist(), name="places")),
        FED,
        1,
        r"layer places \(Rescaling\) cannot be quantized: it has a constant of shape",
    ),
    "function_of_two_axes": (
        saved(lambda: lambda x: ops.mean(x, axis=1, keepdims=True)),
        FED,
        1,
        r"\(Mean\) cannot be quantized: it is over the axes",
    ),
    "nan_weights": (built(nan_weights), FED, 1, "layer conv .*NaN or infinite weights"),
    "classes_that_do_not_exclude_each_other": (
        saved(head="sigmoid"),
        [*FED, "--methods=df_qat_kd"],
        2,
        "gives sigmoid scores.*--methods=df_q",
    ),
    # Flags.
    "preprocessing_unknown": (saved(), (), 2, "input_mean and input_scale are not"),
    "scale_missing": (
        saved(),
        ("--input_mean=0",),
        2,
        "input_scale is None; give both",
    ),
    "mean_that_is_no_number": (
        saved(),
        ("--input_mean=a", "--input_scale=1"),
        2,
        "input_mean is 'a'; give numbers",
    ),
    "scale_of_nothing": (
        saved(),
        ("--input_mean=0", "--input_scale=1/0"),
        2,
        "input_scale is '1/0'; give numbers",
    ),
    "scale_of_zero": (
        saved(),
        ("--input_mean=0", "--input_scale=0"),
        2,
        "every value must be above 0",
    ),
    "mean_of_two_channels": (
        saved(),
        ("--input_mean=0,1", "--input_scale=1"),
        2,
        "input_mean has 2 values for a model with 3 input channels",
    ),
    "labels_absent": (saved(), (*FED, "--labels=no.txt"), 2, "labels is 'no.txt'"),
    "output_that_it_has_not": (
        saved(),
        (*FED, "--output=logits"),
        2,
        r"output is 'logits', but .* last \(Dense\) gives softmax",
    ),
    "score_that_may_be_anything": (
        saved(units=1, head=None),
        FED,
        2,
        r"output is not given, .* one score without a sigmoid, layer last\. "
        r".*--output=logits\) if the score is a logit, above 0 .*mean squared error",
    ),
    "output_that_nothing_has": (
        saved(),
        (*FED, "--output=loud"),
        2,
        "output is 'loud'; it must be one of",
    ),
    "image_size_of_one_side": (
        saved(),
        (*FED, "--image_size=8"),
        2,
        "image_size is '8'",
    ),
    "image_size_of_another_model": (
        saved(),
        (*FED, "--image_size=9,9"),
        2,
        r"image_size is \(9, 9\), but the model takes",
    ),
}


class RefusalsTest(parameterized.TestCase, tf.test.TestCase):
    def test_there_are_as_many_as_promised(self):
        self.assertGreaterEqual(len(CASES), 40)

    @parameterized.named_parameters((name, *case) for name, case in CASES.items())
    def test_one_message_and_nothing_else(self, make, flags, exit_code, message):
        folder = new_folder()
        path = make(folder)
        before = sorted(folder.rglob("*"))
        workdir = folder / "run"
        result = run_in_process(
            "run", f"--teacher={path}", f"--workdir={workdir}", *flags
        )
        self.assertEqual(result.returncode, exit_code, result.stderr)
        self.assertRegex(result.stderr, rf"(?s)\Aerror: [^\n]*{message}")
        self.assertEqual(result.stderr.count("error: "), 1)
        self.assertNotIn("Traceback", result.stderr)
        self.assertEqual(result.stdout, "")
        self.assertEqual(sorted(folder.rglob("*")), before)

    @parameterized.parameters(
        ("cat\ndog\n", "class_names has 2 names for a model with 4 outputs"),
        ("a\n\nc\nd\n", "labels is .*has an empty line"),
        ("", "labels is .*is empty"),
    )
    def test_labels_that_do_not_fit(self, text, message):
        folder = new_folder()
        (folder / "labels.txt").write_text(text)
        path = saved()(folder)
        flags = (f"--labels={folder}/labels.txt", f"--workdir={folder}/run")
        result = run_in_process("run", f"--teacher={path}", *FED, *flags)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(result.stderr, rf"\Aerror: [^\n]*{message}")
        self.assertFalse((folder / "run").exists())

    def test_what_is_in_the_folder_and_not_of_a_run_is_kept(self):
        for name, content, exit_code, message in (
            ("labels.txt", "0 cat\n1 dog\n", 2, "names others; .* with --workdir"),
            ("df_q.tflite", "TFL3", 1, "has df_q.tflite of something else: there is n"),
            ("df_rec.keras", "PK", 1, "has df_rec.keras of something else: there is n"),
            ("report.html", "<p>", 1, "has report.html of something else: there is n"),
        ):
            folder, run = new_folder(), new_folder()
            path = saved()(folder)
            (run / name).write_text(content)
            flags = (f"--teacher={path}", f"--workdir={run}")
            result = run_in_process("run", *FED, *flags)
            self.assertEqual(result.returncode, exit_code, result.stderr)
            self.assertRegex(result.stderr, rf"\Aerror: [^\n]*{message}")
            self.assertEqual([p.name for p in run.iterdir()], [name])
            self.assertEqual((run / name).read_text(), content)

    def test_flags_of_a_file_do_not_describe_a_teacher_to_be_trained(self):
        folder = new_folder()
        flags = ("--dataset=digits", "--input_scale=1/255", f"--workdir={folder}/run")
        result = run_in_process("run", "--teacher=wrn_10_1", *flags)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(
            result.stderr,
            r"\Aerror: input_scale is \['1/255'\], but teacher is 'wrn_10_1', a "
            "network to be trained.* Leave it out",
        )
        self.assertFalse((folder / "run").exists())

    def test_contradictions_name_the_flags(self):
        path = saved()(new_folder())
        more = ("--student=wrn_10_1", "--recipe=bank", "--bank_images=9")
        more += ("--share_images",)
        result = run_in_process("run", f"--teacher={path}", *FED, *more)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertRegex(
            result.stderr,
            r"\Aerror: bank_images is 9 and share_images is True; .*Set bank_images to "
            "0, or leave share_images out",
        )

    def test_teacher_of_another_student_need_not_be_fit_for_quantization(self):
        folder = new_folder()
        path = saved(lambda: L2.Softmax(name="attention"), library=keras)(folder)
        flags = (*FED, f"--workdir={folder}/run")
        result = run_in_process("run", f"--teacher={path}", *flags)
        self.assertRegex(result.stderr, r"\Aerror: .*attention.* cannot be quantized")
        # Refused for what is checked next, when all checks of the networks are past.
        flags = (*FED, "--student=wrn_10_1", f"--workdir={path}/run")
        result = run_in_process("run", f"--teacher={path}", *flags)
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertRegex(result.stderr, r"\Aerror: workdir is .*cannot be written")


if __name__ == "__main__":
    tf.test.main()
