"""What int8fx adds to other libraries: one file for each, which imports it."""
