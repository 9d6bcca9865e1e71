"""From a float network to a fake-quantized one, for any functional Keras model."""
