"""From scores to decisions: conformal p-values, calibrations, the decision rule, regions."""
