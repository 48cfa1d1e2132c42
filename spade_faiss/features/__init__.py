"""Turns images into features: finds and decodes images, runs a backbone, and prepares batches of feature maps."""
