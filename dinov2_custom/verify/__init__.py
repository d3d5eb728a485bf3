"""Find damaged images of a dataset beforehand. Read ``main.verify`` first."""
