"""A Keras model in, an int8 file out.

    python examples/own_model.py my_model.keras my_model.tflite

The model must say how its images are scaled: by a layer such as Rescaling, or by
BatchNormalization, which is asked. Otherwise give `load_classifier` input_mean and
input_scale: the model sees (pixel - mean) * scale.
"""

import pathlib
import sys

import dfq_tf

source, target = sys.argv[1:]
teacher = dfq_tf.load_classifier(source)
quantized = dfq_tf.quantize(teacher)
pathlib.Path(target).write_bytes(quantized.tflite)
images = quantized.held_out
answers = dfq_tf.TFLiteClassifier(quantized.tflite).scores(images).argmax(-1)
share = (answers == teacher.scores(images).argmax(-1)).mean()
print(f"{target} answers as the model on {100 * share:.1f} % of images held out")
