"""`calibrate`: statistics of each layer's inputs on data. `plan`: a scheme for each layer."""
