"""Writes the float TFLite file of a teacher, to compare latencies with.

python benchmarks/float_file.py teachers/wrn_16_1_cifar10.keras runs/float.tflite
litert-benchmark --model=runs/float.tflite --num_threads=1 --num_runs=2000
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf.compat import native_output_hidden, tf
from dfq_tf.files import write_bytes
from dfq_tf.importing.files import read_model


def main() -> None:
    """Converts without any quantization."""
    _, source, target = sys.argv
    model = read_model(source)
    shape = (1, *model.input_shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)], autograph=False)
    def logits(image: tf.Tensor) -> tf.Tensor:
        return model(image, training=False)

    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [logits.get_concrete_function()], model
    )
    with native_output_hidden():
        content = converter.convert()
    write_bytes(target, content)
    print(f"Wrote {target}, {len(content):,} bytes")


if __name__ == "__main__":
    main()
