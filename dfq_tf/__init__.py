"""dfq_tf: a trained Keras classifier in, an integer TFLite model out, no data used."""
