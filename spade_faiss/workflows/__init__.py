"""One module a job, from its input to its result: extract, fit, calibrate, score, evaluate, and the bank's upkeep."""
