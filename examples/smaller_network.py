"""Teaches a smaller network what a model knows, without data, and quantizes it.

    python examples/smaller_network.py my_model.keras my_student.tflite

The smaller network is yours: any functional model of Keras 2 (tf_keras) that takes the
same images and ends in as many logits. This takes 30 minutes; docs/distillation.md says
what more of them bring.
"""

import pathlib
import sys

import dfq_tf
import tf_keras

source, target = sys.argv[1:]
teacher = dfq_tf.load_classifier(source)

layers = tf_keras.layers
image = x = layers.Input(teacher.image_shape)
for filters in (32, 64, 128):
    x = layers.Conv2D(filters, 3, 2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
x = layers.Dense(teacher.num_classes)(layers.GlobalAveragePooling2D()(x))

distilled = dfq_tf.distill(teacher, tf_keras.Model(image, x))
quantized = dfq_tf.quantize(teacher, network=distilled.student)
pathlib.Path(target).write_bytes(quantized.tflite)
