"""What data says of a model: calibration, and a scheme for each layer."""
